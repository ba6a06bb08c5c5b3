"""Lightning's tuners search while our callback is inactive, and the run after them is the same as without it."""

from itertools import product
from typing import Any

import pytest
from helpers import (
    FRONT_ENDS,
    Classifier,
    assert_no_trace,
    assert_same_run,
    build,
    calling,
    fit,
    is_perturbed,
    make_dataset,
    same,
    since_lightning,
    trainer_of,
    weights,
)
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterAveraging, EFMLoRA, FMLoRA
from lightning_flatlora.baselines import BiLoRA


class OwnLoader:
    """A module that builds its loader from ``batch_size``, as the batch-size finder expects."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(make_dataset(24), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(make_dataset(4, seed=2), batch_size=4)


class Passes:
    """Counts passes and, among them, those at moved weights, separately for the finder and for training."""

    def __init__(self, module: Any) -> None:
        self.finding = True
        self.counts = dict.fromkeys(product((True, False), (True, False)), 0)
        module.inside.append(self)

    def end_of_finding(self, *args: Any) -> None:
        self.finding = False

    def __call__(self, module: Any, batch_idx: int) -> None:
        if module.training:
            self.counts[self.finding, is_perturbed(module)] += 1


def assert_inactive_while_finding(passes: Passes) -> None:
    assert passes.counts[True, False] > 0
    assert passes.counts[True, True] == 0
    assert passes.counts[False, True] > 0


def plain_fit(tmp_path: Any, front_end: str, batch_size: int = 4) -> Any:
    """The run without a finder."""
    module, callbacks, kwargs = build(front_end, own=OwnLoader)
    module.batch_size = batch_size
    trainer = trainer_of(tmp_path, callbacks, **kwargs)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("search", ["rate", "batch size"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_finders_as_tuner(tmp_path, front_end, search):
    module, callbacks, kwargs = build(front_end, own=OwnLoader)
    passes = Passes(module)
    trainer = trainer_of(tmp_path, [*callbacks, calling(on_train_start=passes.end_of_finding)], **kwargs)
    if search == "rate":
        finder = Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
        assert len(finder.results["lr"]) == 5
    else:
        Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)
        module.batch_size = 4
    assert_no_trace(module)
    trainer.fit(module)
    assert_inactive_while_finding(passes)
    assert_same_run(trainer, plain_fit(tmp_path, front_end))


OF_RATE = pytest.param(
    lambda: LearningRateFinder(num_training_steps=5, update_attr=False),
    marks=since_lightning("2.5.4", "a run after the finder is another one, without us too (Lightning#21068)"),
)
OF_SIZE = lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2)  # noqa: E731


@pytest.mark.parametrize("make", [OF_RATE, OF_SIZE], ids=["rate", "batch size"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_finders_as_callback(tmp_path, front_end, make):
    """Before ours in the list or, in the case of the rate finder, after it."""
    module, callbacks, kwargs = build(front_end, own=OwnLoader)
    passes = Passes(module)
    finder = make()
    is_rate = isinstance(finder, LearningRateFinder)
    order = [*callbacks, finder] if is_rate else [finder, *callbacks]
    trainer = trainer_of(tmp_path, [*order, calling(on_train_start=passes.end_of_finding)], **kwargs)
    trainer.fit(module)
    assert_inactive_while_finding(passes)
    found = {} if is_rate else {"batch_size": finder.optimal_batch_size}
    assert not is_rate or len(finder.optimal_lr.results["lr"]) == 5
    assert_same_run(trainer, plain_fit(tmp_path, front_end, **found))


class InLaterEpochs(LearningRateFinder):
    """As in Lightning's documentation on fine-tuning."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > 0:
            self.lr_find(trainer, pl_module)


@since_lightning("2.5.4", "a run after the finder is another one, without us too (Lightning#21068)")
@pytest.mark.parametrize("kind", [AdapterAveraging, EFMLoRA, FMLoRA, BiLoRA])
def test_a_rate_finder_in_later_epochs(tmp_path, kind):
    ends = []
    for finders in ([], [InLaterEpochs(num_training_steps=3, update_attr=False)]):
        module, callback = Classifier(), kind(0.5)
        fit(tmp_path, module, [callback, *finders], max_epochs=3)
        ends.append([weights(module), callback.state_dict()])
    assert same(*ends)
