"""A signal ends a run between steps, saved; the run that comes back ends in the bits of one that nobody interrupted."""

import json
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ByHand, ResumableLoader, assert_same_run, build, fit, make_loader, same
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import AdapterCheckpoint, Requeue

BATCHES, EPOCHS = 5, 3
USR1, TERM = 128 + signal.SIGUSR1, 128 + signal.SIGTERM


class Send(Callback):
    """Sends this process a signal in a hook, in one of its calls."""

    def __init__(self, hook: str, call: int = 0, number: int = signal.SIGUSR1) -> None:
        self.left = call

        def method(*args: Any) -> None:
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), number)

        setattr(self, hook, method)


class Notes(Callback):
    """Notes what a run does, over all of its starts."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.notes.append((trainer.current_epoch, args[-1]))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.notes.append(f"val_loss {float(trainer.callback_metrics['val_loss'])}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append("epoch")


def run(
    folder: Path,
    method: str = "efmlora",
    *others: Callback,
    resume: bool = False,
    accumulate: int = 1,
    requeue: Any = None,
    monitor: str | None = "val_loss",
    **settings: Any,
) -> Any:
    """Train three epochs of five batches with a validation of three, or what ``settings`` say."""
    classes = {"classes": (ByHand, ByHand)} if method == "by hand" else {}
    module, callbacks, kwargs = build("plain" if classes else method, accumulate=accumulate, **classes)
    if classes:
        kwargs = {}
    saver = AdapterCheckpoint(folder / "saved", monitor=monitor, save_last=True, save_top_k=1)
    callbacks = [requeue or Requeue(), *callbacks, *others, saver]
    loader = ResumableLoader(list(make_loader(BATCHES)))
    kwargs = {"max_epochs": EPOCHS, "plugins": LightningEnvironment(), **kwargs, **settings}
    val = make_loader(3, seed=7) if monitor == "val_loss" else None
    return fit(folder, module, callbacks, loader, val=val, ckpt_path="last" if resume else None, **kwargs)


def assert_comes_back(tmp_path: Path, method: str, send: Send, status: int = USR1, **settings: Any) -> list[Any]:
    """The run ends with a status, and started again ends as one that was not interrupted; what it did."""
    expected: list[Any] = []
    notes: list[Any] = []
    whole = run(tmp_path / "whole", method, Notes(expected), **settings)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "ended", method, Notes(notes), send, **settings)
    assert end.value.code == status
    assert send.left < 0
    assert len(notes) < len(expected)
    again = run(tmp_path / "ended", method, Notes(notes), resume=True, **settings)
    assert notes == expected
    assert_same_run(whole, again)
    assert same(whole.optimizers[0].state_dict(), again.optimizers[0].state_dict())
    best, expected_best = again.checkpoint_callback, whole.checkpoint_callback
    assert Path(best.best_model_path).name == Path(expected_best.best_model_path).name
    assert best.best_model_score == expected_best.best_model_score
    assert {path.name for path in (tmp_path / "ended/saved").iterdir()} == {
        path.name for path in (tmp_path / "whole/saved").iterdir()
    }
    return notes


METHODS = ("plain", "efmlora", "fmlora", "module", "efmlora+module", "by hand")
MOMENTS = {
    "start": Send("on_train_batch_start", 6),
    "backward": Send("on_after_backward", 6),
    "between the average and the optimizer": Send("on_before_optimizer_step", 6),
    "end": Send("on_train_batch_end", 6),
    "last batch": Send("on_train_batch_start", 4),
    "end of the last batch": Send("on_train_batch_end", 9),
    "validation": Send("on_validation_batch_start", 4),
    "end of validation": Send("on_validation_end", 0),
    "end of an epoch": Send("on_train_epoch_end", 1),
    "sanity check": Send("on_sanity_check_start", 0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_it_comes_back(tmp_path: Path, method: str, moment: str) -> None:
    hook = MOMENTS[moment]
    send = Send(next(name for name in vars(hook) if name.startswith("on_")), hook.left)
    assert_comes_back(tmp_path, method, send, num_sanity_val_steps=1)
