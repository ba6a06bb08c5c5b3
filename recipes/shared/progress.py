"""How far long work has come: a bar in a terminal, and in a log a line every ten seconds."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from lightning_flatlora.callbacks.fmlora import counting_windows

_SECONDS = 10.0  # between two lines


def progress_bar(name: str) -> ProgressBar:
    """Lightning's progress bar for where the output goes: rich's in a terminal, else lines that begin with a name."""
    return RichProgressBar() if is_live() else ProgressLines(name)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how far something is, in the same two ways.

    Args:
        what: is being done.
        total: its steps.

    Yields:
        A function to call after each step.
    """
    if not is_live():
        yield Lines(what, total).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda: shown.advance(bar)


class Lines:
    """Lines on how far something is: the first at once, then one every ten seconds, and one at the end.

    Args:
        what: is being done.
        total: its steps.
        done: how many of them are done already.

    Example:
        >>> lines = Lines("Counting", total=2)
        Counting: 0 of 2
        >>> lines.advance()
        >>> lines.advance()
        Counting: 2 of 2, 0 s
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what = what
        self.total = total
        self.done = self._first = done
        self._began = self._printed = monotonic()
        self._print("")

    def advance(self, note: str = "") -> None:
        """A step is done; the note, if there is one, ends the line."""
        self.done += 1
        now = monotonic()
        if self.done != self.total and now - self._printed < _SECONDS:
            return
        self._printed = now
        elapsed = now - self._began
        times = f", {elapsed:.0f} s"
        if self.done < self.total:
            # Steps from before a resume took none of the time.
            times += f", about {elapsed / (self.done - self._first) * (self.total - self.done):.0f} s left"
        self._print(times + (f", {note}" if note else ""))

    def _print(self, more: str) -> None:
        print(f"{self.what}: {self.done} of {self.total}{more}", flush=True)


class ProgressLines(ProgressBar):
    """Lightning's progress bar in lines; where a length is unknown there are none.

    Args:
        name: that begins each line, a method's for example.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._is_on = True
        self._training: Lines | None = None
        self._evaluation: Lines | None = None

    @override
    def enable(self) -> None:
        self._is_on = True

    @override
    def disable(self) -> None:  # which Lightning does on all ranks but the first
        self._is_on = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with counting_windows(trainer):
            steps = trainer.estimated_stepping_batches
        if self._is_on and not math.isinf(steps):
            self._training = Lines(f"{self._name}, training steps", int(steps), trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        lines = self._training
        if lines is not None and trainer.global_step > lines.done:  # not every batch ends a step
            loss = trainer.progress_bar_metrics.get("train_loss")
            lines.advance("" if loss is None else f"loss {loss:.3f}")

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_evaluation("validation batches", trainer.num_val_batches)

    @override
    def on_validation_batch_end(self, *arguments: Any, **named: Any) -> None:
        self._advance_evaluation()

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin_evaluation("test batches", trainer.num_test_batches)

    @override
    def on_test_batch_end(self, *arguments: Any, **named: Any) -> None:
        self._advance_evaluation()

    def _begin_evaluation(self, what: str, batches: Sequence[int | float]) -> None:
        number = sum(batches)
        self._evaluation = None
        if self._is_on and not math.isinf(number):
            self._evaluation = Lines(f"{self._name}, {what}", int(number))

    def _advance_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.advance()


def quiet() -> None:
    """Only what matters here: Lightning's hints on workers and logging intervals do not."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*is_gradient_checkpointing.*",
        ".*set_vital.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def is_live() -> bool:
    """Whether what is shown can be drawn over."""
    console = Console()
    return console.is_terminal or console.is_jupyter
