"""A callback over a Trainer's life: a second fit, weight averaging, steps that nobody announces, several optimizers,
and copies that are made in the middle of a fit.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    Classifier,
    E_hat,
    TwoPassClassifier,
    assert_no_trace,
    build,
    driver_of,
    fit,
    make_loader,
    make_net,
    same,
    weights,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from test_following import moved
from torch import Tensor, nn

from lightning_flatlora import (
    AdapterCheckpoint,
    CosineRho,
    EFMLoRA,
    FlatnessMonitor,
    FMLoRA,
    LearningRateRho,
    LinearRho,
)
from lightning_flatlora.baselines import SAM, BalancednessRegularization, LoRASAM, RandomPerturbation

# -- a second fit


class Sizes(Callback):
    """rho of every step."""

    def __init__(self, callback: Any = None) -> None:
        self.callback, self.sizes = callback, []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.sizes.append((self.callback or driver_of(trainer)).current_rho(trainer))


@pytest.mark.parametrize("schedule", [LinearRho(1.0, 0.0), LearningRateRho(1.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_second_fit_goes_on_with_the_schedule(tmp_path, front_end, schedule):
    """One origin, and one initial learning rate: rho counts from the first fit's first step, towards the last's end."""
    module, callbacks, kwargs = build(front_end, rho=schedule)
    sizes = Sizes()
    trainer = fit(tmp_path, module, [*callbacks, sizes], max_epochs=1, **kwargs)
    trainer.fit_loop.max_epochs = 4
    module.lr = 0.01
    trainer.fit(module, make_loader(), make_loader(1))
    assert driver_of(trainer).step == 24
    if isinstance(schedule, LinearRho):
        assert sizes.sizes[6:] == pytest.approx([1 - step / 24 for step in range(6, 24)])
    else:
        assert sizes.sizes == pytest.approx([1.0] * 6 + [0.5] * 18)


def test_another_trainer_starts_anew(tmp_path):
    module, callback = Classifier(), EFMLoRA(CosineRho(1.0, 0.0))
    fit(tmp_path, module, [callback], max_epochs=1)
    sizes = Sizes(callback)
    fit(tmp_path, module, [callback, sizes], max_epochs=1)
    assert callback.step == 6
    assert sizes.sizes[0] == 1.0


def test_a_second_fit_from_a_checkpoint_takes_its_count(tmp_path):
    module, callback = Classifier(), EFMLoRA(0.5)
    saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = fit(tmp_path, module, [callback, saving])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, make_loader(), make_loader(1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.step == trainer.global_step == 18


# -- weight averaging


class Normed(nn.Module):
    """BatchNorm before the adapted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(6), make_net()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.norm(inputs))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_epoch_that_refreshes_batch_norm_is_clean(tmp_path, front_end):
    """Weight averaging runs it without any step: clean weights, no second pass, no count, no part of the horizon."""
    module, callbacks, kwargs = build(front_end, rho=LinearRho(1.0, 0.0), net=Normed())
    passes: list[Any] = []
    module.inside.append(lambda module, _: passes.append((module.trainer.current_epoch, bool(moved(module)))))
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = fit(tmp_path, module, [*callbacks, averaging], **kwargs)
    assert [moved for epoch, moved in passes if epoch == 2] == [False] * 6
    assert any(moved for epoch, moved in passes if epoch < 2)
    driver = driver_of(trainer)
    assert driver.step == driver._horizon == 12
    assert_no_trace(module)


# -- steps that nobody announces


class StepsInside(Classifier):
    """Steps the optimizer inside Lightning's."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)


class StepsInsideByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch, batch_idx))
        self.optimizers().optimizer.step()


@pytest.mark.parametrize(
    ("form", "callback"),
    [
        (StepsInside, EFMLoRA),
        (StepsInside, FMLoRA),
        (StepsInside, LoRASAM),
        (StepsInside, SAM),
        (StepsInside, BalancednessRegularization),
        (StepsInside, RandomPerturbation),
        (StepsInsideByHand, EFMLoRA),
    ],
)
def test_a_step_past_lightning_is_refused_before_it_is_taken(tmp_path, form, callback):
    module = form()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"optimizer.step\(closure=optimizer_closure\)") as error:
        fit(tmp_path, module, [callback(0.5)])
    assert callback.__name__ in str(error.value)
    assert same(weights(module), before)
    assert_no_trace(module)


class Warmup(Classifier):
    """Steps every second batch, as a schedule of one's own may do, through what it is given."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Lookahead(torch.optim.AdamW):
    """An optimizer that steps another inside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = torch.optim.AdamW(*args, **kwargs)

    def step(self, closure: Any = None) -> Any:
        return self.fast.step(closure)


@pytest.mark.parametrize("kind", ["skips", "wraps"])
def test_steps_that_are_skipped_or_wrapped_on_purpose(tmp_path, kind):
    module, callback = Warmup() if kind == "skips" else Classifier(), EFMLoRA(0.5)
    if kind == "wraps":
        module.optimizer_class = Lookahead
    fit(tmp_path, module, [callback])
    assert callback.step == (6 if kind == "skips" else 12)
    assert all(E.any() for E in E_hat(callback).values())


def test_nothing_watches_after_a_fit(tmp_path):
    module, callback = Classifier(), EFMLoRA(0.5)
    trainer = fit(tmp_path, module, [callback], max_epochs=1)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert "optimizer_step" not in vars(trainer.strategy)


# -- several optimizers


class Pair(LightningModule):
    """Two networks under LoRA that are trained against each other, each by its own optimizer."""

    def __init__(self, toggle: bool = False, adapters: tuple[str, str] = ("default", "default")) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.nets = nn.ModuleDict(
            {
                name: get_peft_model(
                    nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"]), adapter_name=adapter
                )
                for name, adapter in zip(("generator", "critic"), adapters, strict=True)
            }
        )
        self.reads: list[list[str]] = []

    def configure_optimizers(self) -> Any:
        nets = self.nets.values()
        return [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02) for net in nets]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, _, _ = batch
        generator, critic = self.nets.values()
        for i, (optimizer, sign) in enumerate(zip(self.optimizers(), (1, -1), strict=True)):
            if i == 0 and batch_idx % 2:
                continue  # the generator is stepped half as often
            if self.toggle:
                self.toggle_optimizer(optimizer)
            made = generator(inputs)
            loss = sign * (critic(made) - critic(inputs)).square().mean()
            self.reads.append([name.split(".")[1] for name in _readers(self) if name])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)


def _readers(module: nn.Module) -> list[str]:
    return [
        name
        for name, part in module.named_modules()
        if ".lora_B." in name and not torch.equal(part.weight, part._parameters["weight"])
    ]


@pytest.mark.parametrize("toggle", [False, True])
def test_one_callback_follows_the_pairs_of_each_optimizer(tmp_path, toggle):
    """Each optimizer's pairs have their own step count; a toggled one's are read clean while the other learns."""
    torch.manual_seed(0)
    module, callback = Pair(toggle), EFMLoRA(0.1, estimator="projected", beta=1.0)
    fit(tmp_path, module, [callback], max_epochs=1)
    assert [course.step for course in callback.courses] == [3, 6]
    assert [len(course.pairs) for course in callback.courses] == [1, 1]
    for course in callback.courses:
        (pair,) = course.pairs
        (E,) = course.perturbation.state_dict()["E"].values()
        radius = float((pair.scaling * E @ pair.A.detach()).norm())
        assert 0 < radius < 0.11  # rho is 0.1, and A one step further than when E was taken
    both = ["generator", "critic"]
    if toggle:
        assert module.reads[:5] == [[], [], ["critic"], ["generator"], ["critic"]]
    else:
        assert module.reads == [[], ["generator"], *[both] * 7]
    assert_no_trace(module)


@pytest.mark.parametrize("callbacks", [1, 2])
def test_a_run_of_several_optimizers_is_resumed(tmp_path, callbacks):
    """With one callback for both, or one for each adapter: the states lie side by side in the file."""

    def run(ckpt_path: Any = None) -> Any:
        torch.manual_seed(0)
        module = Pair(adapters=("default", "default") if callbacks == 1 else ("gen", "crit"))
        names = [None] if callbacks == 1 else ["gen", "crit"]
        ours = [EFMLoRA(CosineRho(0.5, 0.1, total_steps=20), adapter_name=name) for name in names]
        saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        fit(tmp_path, module, [*ours, saving], max_epochs=3, ckpt_path=ckpt_path)
        return module, [course.state_dict(True) for each in ours for course in each.courses if course.pairs]

    whole = run()
    file = tmp_path / "epoch=1.ckpt"
    states = torch.load(file, weights_only=True)["callbacks"]
    assert len([key for key in states if "EFMLoRA" in key]) == callbacks
    resumed = run(file)
    assert same(weights(whole[0]), weights(resumed[0]))
    assert same(whole[1], resumed[1])
    assert [state["step"] for state in whole[1]] == [9, 18]


def test_one_callback_for_both_equals_one_for_each_adapter(tmp_path):
    """Where every optimizer has one adapter's pairs, the two ways are the same."""
    ends = []
    for names in ([None], ["gen", "crit"]):
        torch.manual_seed(0)
        module = Pair(adapters=("gen", "crit"))
        fit(tmp_path, module, [EFMLoRA(0.5, adapter_name=name) for name in names], max_epochs=1)
        ends.append(weights(module))
    assert same(*ends)


def test_two_callbacks_on_the_same_pairs_are_refused(tmp_path):
    module = Pair(adapters=("gen", "crit"))
    with pytest.raises(MisconfigurationException, match="keep one"):
        fit(tmp_path, module, [EFMLoRA(0.5, adapter_name="gen"), EFMLoRA(0.5)])


def test_two_passes_refuse_several_optimizers_with_the_remedy(tmp_path):
    with pytest.raises(MisconfigurationException, match="use EFMLoRA"):
        fit(tmp_path, Pair(), [FMLoRA(0.5)])


def test_a_named_adapter_alone_keeps_the_key_of_older_files(tmp_path):
    module, callback = Classifier(), EFMLoRA(0.5, adapter_name="default")
    trainer = fit(tmp_path, module, [callback], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert "EFMLoRA" in torch.load(tmp_path / "file.ckpt", weights_only=True)["callbacks"]


def test_two_that_each_ran_alone_run_together(tmp_path):
    ours = [EFMLoRA(0.5, adapter_name=name) for name in ("gen", "crit")]
    for name, callback in zip(("gen", "crit"), ours, strict=True):
        trainer = fit(tmp_path, Classifier(net=one_adapter(name)), [callback], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert len({pickle.loads(pickle.dumps(callback)).state_key for callback in ours}) == 2
    fit(tmp_path, Pair(adapters=("gen", "crit")), ours, max_epochs=1)
    assert [callback.step for callback in ours] == [3, 6]


def one_adapter(name: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 3))
    return get_peft_model(net, LoraConfig(r=2, target_modules=["0"]), adapter_name=name)


class OneForBoth(Pair):
    """The same networks, in one optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.nets["critic"](self.nets["generator"](batch[0])).square().mean())
        optimizer.step()


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        (Pair, OneForBoth, "state of 2 optimizers, and this run has 1"),
        (OneForBoth, Pair, "checkpoint but not in the model"),
    ],
)
def test_another_number_of_optimizers_is_refused(tmp_path, saved, resumed, message):
    """Lightning hands the optimizers' states out as far as they go, and ours would be lost without a word."""
    file = tmp_path / "file.ckpt"
    fit(tmp_path, saved(), [EFMLoRA(0.5)], max_epochs=1).save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["optimizer_states"] = []
    torch.save(checkpoint, file)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, resumed(), [EFMLoRA(0.5)], ckpt_path=file)


# -- copies


class Copying(Callback):
    """Copies and pickles all callbacks in the hooks of a batch."""

    def __init__(self) -> None:
        self.copies: list[Any] = []

    def copy(self, trainer: Any) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]
        for each in others:
            pickled = pickle.loads(pickle.dumps(each))
            copied = copy.deepcopy(each)
            self.copies.append((each.state_dict(), pickled.state_dict(), copied.state_dict()))
            assert not [value for value in vars(copied).values() if isinstance(value, nn.Module)]

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.copy(trainer)

    def on_after_backward(self, trainer: Any, *args: Any) -> None:
        self.copy(trainer)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.copy(trainer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [EFMLoRA(0.5), FlatnessMonitor(every_n_steps=2)],
        lambda: [FMLoRA(CosineRho(0.5, 0.1))],
        lambda: [SAM(0.1)],
        lambda: [LoRASAM(0.1)],
        lambda: [RandomPerturbation(0.1)],
        lambda: [BalancednessRegularization(0.1)],
        lambda: [AdapterCheckpoint()],
        list,
    ],
    ids=lambda make: type(make()[0]).__name__ if make is not list else "FMLoRAModule",
)
def test_callbacks_are_copied_and_pickled_in_mid_fit(tmp_path, make):
    """With their state, without any part in the fit; and the fit is what it is without the copying."""
    ends = []
    for copying in (Copying(), None):
        callbacks = make()
        module = Classifier() if callbacks else TwoPassClassifier(0.5)
        fit(tmp_path, module, [*callbacks, *([copying] if copying else [])], max_epochs=1)
        ends.append(weights(module))
        if copying:
            assert copying.copies
            assert all(same(state, other) for state, *others in copying.copies for other in others)
    assert same(*ends)


def test_a_copy_of_mid_fit_can_be_trained_with(tmp_path):
    class Last(Callback):
        copied: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.copied = copy.deepcopy(trainer.callbacks[0])

    last = Last()
    fit(tmp_path, Classifier(), [EFMLoRA(0.5), last], max_epochs=1)
    ends = []
    for callback in (last.copied, EFMLoRA(0.5)):
        module = Classifier()
        fit(tmp_path, module, [callback], max_epochs=1)
        ends.append((weights(module), callback.step))
    assert same(*ends)
