"""Progress of long work: a bar in a terminal, and a line every ten seconds in a log."""

import logging
import sys
import warnings
from time import monotonic
from typing import Any

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning_utilities.core import rank_zero
from rich.console import Console
from typing_extensions import override

_SECONDS = 10.0  # between two lines
_HINTS = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*is_gradient_checkpointing.*",
    ".*set_vital.*",
    "The `srun` command is available on your system but is not used",
    "Precision .* is not supported by the model summary",
    "The dirpath has changed",  # in every resumed run
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"\s*``instantiate_classes`` was deprecated",
    "The '.*_dataloader' does not have many workers",  # the recipes' own numbers suit their data
    "Checkpoint directory .* exists and is not empty",  # in a resumed run
)
_REMARKS = ("💡 Tip", "TPU available", "Loading `train_dataloader` to estimate", "Failed to load CPU gemm_4bit_forward")
"""Beginnings of lines that other libraries log in every run and that are of no use to its user."""
_FORM = "{desc}{n_fmt} of {total_fmt}, {elapsed}<{remaining}{postfix}"


def progress_bar(name: str) -> ProgressBar:
    """Return Lightning's progress bar: rich's in a terminal, else lines that begin with a name."""
    return RichProgressBar() if is_live() else ProgressLines(name)


def progress(what: str, total: int) -> Tqdm:
    """Return a bar for other work, or its lines: a context in which ``update()`` counts the steps done.

    Args:
        what: name of the work.
        total: number of its steps.
    """
    kind = Tqdm if is_live() else Lines
    return kind(desc=f"{what}: ", total=total, file=sys.stdout)


class Lines(Tqdm):
    """A bar printed as lines, one every ten seconds and one at the end, for files, which can't be redrawn."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._shown, self._shown_at = 0, monotonic()
        super().__init__(*args, **{"bar_format": _FORM, "leave": False, **settings})

    @override
    def reset(self, total: float | None = None) -> None:
        self._shown = 0  # Lightning begins each epoch with a reset
        super().reset(total)

    @override
    def display(self, *args: Any, **settings: Any) -> None:
        now = monotonic()
        is_due = now - self._shown_at >= _SECONDS or self.n == self.total
        if is_due and self.n != self._shown:
            self._shown, self._shown_at = self.n, now
            print(self, file=self.fp, flush=True)


class ProgressLines(TQDMProgressBar):
    """Lightning's progress bar in lines.

    Args:
        name: begins each line, such as a method's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _lines(self) -> Lines:
        return Lines(disable=self.is_disabled, file=sys.stdout, bar_format=f"{self._name}, {_FORM}")

    init_sanity_tqdm = init_train_tqdm = init_validation_tqdm = init_test_tqdm = init_predict_tqdm = _lines


def without_hints() -> None:
    """Silence messages that other libraries print in every run and that are of no use to its user."""
    for message in _HINTS:
        warnings.filterwarnings("ignore", message=message)
    # A logger's filter does not see the lines of others. Lightning's logger is that of its package imported last.
    for logger in (rank_zero.log, logging.getLogger("bitsandbytes.backends.cpu.ops")):
        logger.addFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REMARKS)


def quiet() -> None:
    """Silence Lightning's remarks on devices too, for a demo."""
    without_hints()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def is_live() -> bool:
    """Return whether the output can be redrawn."""
    console = Console()
    return console.is_terminal or console.is_jupyter
