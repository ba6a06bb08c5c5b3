"""A callback over a Trainer's life: evaluation, a second fit, weight averaging, and user-defined steps."""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    ByHand,
    Classifier,
    E_hat,
    FromIterator,
    Losses,
    TwoPassClassifier,
    assert_no_trace,
    assert_same_run,
    build,
    calling,
    driver_of,
    fit,
    is_perturbed,
    make_dataset,
    make_loader,
    make_net,
    moved,
    same,
    trainer_of,
    weights,
    with_own,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FMLoRA, LearningRateRho, LinearRho
from lightning_flatlora.patching import put_on_instance

# -- a second fit


def noting(sizes: list[float]) -> Callback:
    """A callback that notes rho in each step."""
    return calling(on_train_batch_start=lambda trainer, *_: sizes.append(driver_of(trainer).current_rho))


@pytest.mark.parametrize("schedule", [LinearRho(1.0, 0.0), LearningRateRho(1.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_second_fit_goes_on_with_the_schedule(tmp_path, front_end, schedule):
    """rho starts at the first fit's first step and initial learning rate, and runs to the end of the last fit."""
    module, callbacks, kwargs = build(front_end, rho=schedule)
    sizes: list[float] = []
    trainer = fit(tmp_path, module, [*callbacks, noting(sizes)], max_epochs=1, **kwargs)
    trainer.fit_loop.max_epochs = 4
    module.lr = 0.01
    trainer.fit(module, make_loader(), make_loader(1))
    assert driver_of(trainer).step == 24
    if isinstance(schedule, LinearRho):
        assert sizes[6:] == pytest.approx([1 - step / 24 for step in range(6, 24)])
    else:
        assert sizes == pytest.approx([1.0] * 6 + [0.5] * 18)


@pytest.mark.parametrize("between", ["validate", "resumed"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_second_fit_goes_on_whatever_was_loaded_before(tmp_path, front_end, between):
    """Lightning still remembers the last run's checkpoint when the second fit begins."""
    module, callbacks, kwargs = build(front_end, rho=LinearRho(1.0, 0.0, total_steps=24))
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(tmp_path, module, [*callbacks, saving], max_epochs=1, **kwargs)
    last = tmp_path / "last.ckpt"
    if between == "validate":
        trainer.validate(module, make_loader(1), ckpt_path=last, verbose=False)
    else:
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, make_loader(), make_loader(1), ckpt_path=last)
    before = trainer.global_step
    trainer.fit_loop.max_epochs = 3
    sizes: list[float] = []
    trainer.callbacks.append(noting(sizes))
    trainer.fit(module, make_loader(), make_loader(1))
    assert driver_of(trainer).step == 18
    assert sizes == pytest.approx([1 - step / 24 for step in range(before, 18)])
    if between == "validate":
        # Nor does another Trainer use what was loaded for an evaluation.
        other = trainer_of(tmp_path, [*callbacks], max_epochs=1, limit_val_batches=1, **kwargs)
        other.validate(module, make_loader(1), ckpt_path=last, verbose=False)
        other.fit(module, make_loader(), make_loader(1))
        assert driver_of(other).step == 6


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
    """Weight averaging runs it without steps: clean weights, no second pass, no count, no part of the schedule."""
    module, callbacks, kwargs = build(front_end, rho=LinearRho(1.0, 0.0), net=Normed())
    passes: list[Any] = []
    module.inside.append(lambda module, _: passes.append((module.trainer.current_epoch, bool(moved(module)))))
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = fit(tmp_path, module, [*callbacks, averaging], **kwargs)
    assert [moved for epoch, moved in passes if epoch == 2] == [False] * 6
    assert any(moved for epoch, moved in passes if epoch < 2)
    driver = driver_of(trainer)
    assert driver.step == driver.method.horizon == 12
    assert_no_trace(module)


# -- user-defined steps


class EverySecond(Classifier):
    """Steps only every second batch, by the optimizer and closure that it is given, as a user's schedule may do."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_steps_may_be_skipped(tmp_path):
    callback = EFMLoRA(0.5)
    fit(tmp_path, EverySecond(), [callback], max_epochs=1)
    assert callback.step == 3
    assert all(E.any() for E in E_hat(callback).values())


# -- evaluation, and fitting again


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_evaluation_sees_clean_weights(tmp_path, front_end):
    """In the sanity check, during epochs and after the fit, the logits are those of the stored weights."""
    module, callbacks, kwargs = build(front_end)
    seen: list[str] = []
    inputs = make_dataset(4).tensors[0]

    def look(module: Any, batch_idx: int) -> None:
        if module.training:
            return
        seen.append(str(module.trainer.state.stage.value))
        plain = make_net()
        plain.load_state_dict(module.net.state_dict())
        assert same(module.net(inputs), plain.eval()(inputs))

    module.inside.append(look)
    val = make_loader(1)
    trainer = fit(tmp_path, module, callbacks, val=val, num_sanity_val_steps=1, val_check_interval=2, **kwargs)
    trainer.validate(module, val, verbose=False)
    trainer.test(module, val, verbose=False)
    assert seen == ["sanity_check"] + ["validate"] * 7 + ["test"]
    assert_no_trace(module)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_validation_does_not_change_the_run(tmp_path, front_end):
    runs = []
    for val in (None, make_loader(2)):
        module, callbacks, kwargs = build(front_end, accumulate=2)
        trainer = fit(tmp_path, module, callbacks, val=val, val_check_interval=3, **kwargs)
        runs.append(trainer)
    assert_same_run(*runs)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_second_fit_of_one_trainer(tmp_path, front_end):
    """With a higher max_epochs the same Trainer trains on: the count continues; Ê starts anew, like the optimizer."""
    module, callbacks, kwargs = build(front_end)
    trainer = fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    fresh, fresh_callbacks, _ = build(front_end)
    fresh.load_state_dict(module.state_dict())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader(), make_loader(1))
    other = fit(tmp_path, fresh, fresh_callbacks, max_epochs=1, **kwargs)
    assert same(weights(module), weights(fresh))
    assert (driver_of(trainer).step, driver_of(other).step) == (12, 6)


# -- compiled networks


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_compiled_network_toggles_without_recompiling(tmp_path, front_end):
    """One graph for the clean and one for the perturbed weights; the run equals that of the uncompiled network."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module, callbacks, kwargs = build(front_end, net=torch.compile(make_net(), backend=counter))
    trainer = fit(tmp_path, module, callbacks, **kwargs)
    assert counter.frame_count == 2
    assert_no_trace(module)
    other, other_callbacks, kwargs = build(front_end)
    plain = fit(tmp_path, other, other_callbacks, **kwargs)
    for left, right in zip(weights(module).values(), weights(other).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    E, expected = E_hat(driver_of(trainer)), E_hat(driver_of(plain))
    assert list(E) == list(expected)  # no _orig_mod in the names


# -- manual optimization by the user, and other forms of training_step


class InWindows(ByHand):
    """With one optimizer for everything, or one for the pairs and one for the bias."""

    def __init__(self, optimizers: int, accumulate: int) -> None:
        super().__init__()
        self.count, self.accumulate = optimizers, accumulate
        self.looks: list[tuple[bool, bool]] = []

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [list(trained.values())]
        if self.count == 2:
            of_pairs = [p for name, p in trained.items() if "lora" in name]
            groups = [[p for name, p in trained.items() if "lora" not in name], of_pairs]
        return [torch.optim.AdamW(group, lr=self.lr) for group in groups]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            super().training_step(batch, batch_idx)
        else:
            self.manual_backward(self.loss(batch, batch_idx))
        self.looks.append((is_perturbed(self), same(self.net.state_dict(), copy.deepcopy(self.net).state_dict())))

    def loss(self, batch: Any, batch_idx: int) -> Any:
        return super().loss(batch, batch_idx) / self.accumulate


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_efmlora_in_a_module_optimized_by_hand(tmp_path, optimizers, accumulate):
    """With one optimizer, or two of which one holds all pairs, the run equals automatic optimization bit for bit."""
    module = InWindows(optimizers, accumulate)
    callback, other_callback = EFMLoRA(0.5, every_n_steps=2), EFMLoRA(0.5, every_n_steps=2)
    fit(tmp_path, module, [callback])
    other = Classifier()
    fit(tmp_path, other, [other_callback], accumulate_grad_batches=accumulate)
    assert same(weights(module), weights(other))
    assert same(E_hat(callback), E_hat(other_callback))
    assert callback.step == other_callback.step == 12 // accumulate
    assert all(moved for moved, _ in module.looks[accumulate:])
    assert all(clean for _, clean in module.looks)
    assert_no_trace(module)


class NoIndex(Losses, LightningModule):
    """Takes only the batch, and returns a mapping."""

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch, 0), "more": 1}


FORMS = [(with_own(FromIterator)[0], EFMLoRA), (NoIndex, EFMLoRA), (NoIndex, FMLoRA)]


@pytest.mark.parametrize(("form", "callback"), FORMS, ids=lambda c: c.__name__)
def test_other_forms_of_training_step(tmp_path, form, callback):
    module, other = form(), Classifier()
    fit(tmp_path, module, [callback(0.5)])
    fit(tmp_path, other, [callback(0.5)])
    assert same(weights(module), weights(other))


def test_put_on_instance_restores_what_was_there() -> None:
    module = Classifier()
    put_back = put_on_instance(module, "log", lambda: "put")
    assert module.log() == "put"  # type: ignore[call-arg, func-returns-value]
    put_back()
    put_back()
    assert "log" not in module.__dict__
    module.log = repr  # type: ignore[method-assign, assignment]
    below, above = put_on_instance(module, "log", str), put_on_instance(module, "log", int)
    below()  # patches may end in any order
    assert module.log is int
    above()
    assert module.log is repr
    put_back = put_on_instance(module, "log", str)
    module.log = int  # type: ignore[method-assign, assignment]
    put_back()
    assert module.log is int  # a patch that other code has added on top is kept


def test_an_instances_own_configure_optimizers_is_kept(tmp_path: Any) -> None:
    """LightningCLI sets one for an optimizer in YAML."""
    module = TwoPassClassifier(0.5)
    own = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    module.configure_optimizers = own  # type: ignore[method-assign]
    trainer = fit(tmp_path, module, [], max_epochs=1)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert module.configure_optimizers is own
