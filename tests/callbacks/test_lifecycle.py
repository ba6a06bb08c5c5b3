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
    assert_no_trace,
    build,
    calling,
    driver_of,
    fit,
    make_loader,
    make_net,
    same,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FlatnessMonitor, FMLoRA, LearningRateRho, LinearRho
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
    if between == "validate":
        # Neither does another Trainer take what an evaluation has loaded.
        other = trainer_of(tmp_path, [*callbacks], max_epochs=1, limit_val_batches=1, **kwargs)
        other.validate(module, make_loader(1), ckpt_path=last, verbose=False)
        other.fit(module, make_loader(), make_loader(1))
        assert driver_of(other).step == 6


def test_a_used_trainer_takes_no_count_from_a_checkpoint_of_plain_lora(tmp_path):
    fit(tmp_path, Classifier(), [ModelCheckpoint(tmp_path, save_last=True)], max_epochs=1)
    callback = EFMLoRA(LinearRho(1.0, 0.0, total_steps=24))
    trainer = fit(tmp_path, Classifier(), [callback])
    sizes = Sizes(callback)
    trainer.callbacks.append(sizes)
    trainer.fit(Classifier(), make_loader(), make_loader(1), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 12
    assert sizes.sizes == pytest.approx([1 - step / 24 for step in range(6)])


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


METHODS = [EFMLoRA, FMLoRA, SAM, LoRASAM, RandomPerturbation, BiLoRA, BalancednessRegularization, FlatnessMonitor]


@pytest.mark.parametrize("make", METHODS)
def test_copies_and_pickles_of_mid_fit_have_the_state_and_can_be_trained_with(tmp_path, make):
    copies: list[Any] = []

    def copied(trainer: Any, *args: Any) -> None:
        ours = trainer.callbacks[0]
        copies[:] = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
        assert all(same(each.state_dict(), ours.state_dict()) for each in copies)

    hooks = dict.fromkeys(("on_train_batch_start", "on_after_backward", "on_train_batch_end"), copied)
    fit(tmp_path, Classifier(), [make(0.1), calling(**hooks)], max_epochs=1)
    ends = []
    for callback in (make(0.1), *copies):
        module = Classifier()
        fit(tmp_path, module, [callback], max_epochs=1)
        ends.append(weights(module))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
