"""A callback over a Trainer's life: a second fit, weight averaging, hidden steps, and copies made in mid-fit."""

import copy
import pickle
from typing import Any

import pytest
from changing_models import moved
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
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
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
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

# -- a second fit


class Sizes(Callback):
    """rho of every step."""

    def __init__(self, callback: Any = None) -> None:
        self.callback, self.sizes = callback, []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.sizes.append((self.callback or driver_of(trainer)).current_rho)


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


@pytest.mark.parametrize("between", ["validate", "resumed"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_second_fit_goes_on_whatever_was_loaded_before(tmp_path, front_end, between):
    """Lightning still knows the last run's checkpoint when the second fit begins."""
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
    sizes = Sizes()
    trainer.callbacks.append(sizes)
    trainer.fit(module, make_loader(), make_loader(1))
    assert driver_of(trainer).step == 18
    assert sizes.sizes == pytest.approx([1 - step / 24 for step in range(before, 18)])


def test_a_used_trainer_takes_no_count_from_a_checkpoint_of_plain_lora(tmp_path):
    fit(tmp_path, Classifier(), [ModelCheckpoint(tmp_path, save_last=True)], max_epochs=1)
    callback = EFMLoRA(LinearRho(1.0, 0.0, total_steps=24))
    trainer = fit(tmp_path, Classifier(), [callback])
    sizes = Sizes(callback)
    trainer.callbacks.append(sizes)
    trainer.fit(Classifier(), make_loader(), make_loader(1), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12
    assert sizes.sizes == pytest.approx([1 - step / 24 for step in range(6)])


def test_another_trainer_starts_anew(tmp_path):
    module, callback = Classifier(), EFMLoRA(CosineRho(1.0, 0.0))
    fit(tmp_path, module, [callback], max_epochs=1)
    sizes = Sizes(callback)
    fit(tmp_path, module, [callback, sizes], max_epochs=1)
    assert callback.step == 6
    assert sizes.sizes[0] == 1.0


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
    assert driver.step == driver.method.horizon == 12
    assert_no_trace(module)


# -- steps of a user's own


class EverySecond(Classifier):
    """Steps every second batch, as a schedule of one's own may do, through what it is given."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_steps_may_be_skipped_and_nothing_watches_after_a_fit(tmp_path):
    callback = EFMLoRA(0.5)
    trainer = fit(tmp_path, EverySecond(), [callback], max_epochs=1)
    assert callback.step == 3
    assert all(E.any() for E in E_hat(callback).values())
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert "optimizer_step" not in vars(trainer.strategy)


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
        lambda: [BiLoRA(0.1)],
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
            for state, *others in copying.copies:
                assert all(same(state, other) for other in others)
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
