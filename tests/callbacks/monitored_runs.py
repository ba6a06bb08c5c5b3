"""Runs with a FlatnessMonitor, of modules that keep many kinds of state, and what their loggers received."""

from typing import Any

from helpers import fit
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_flatlora import FlatnessMonitor
from lightning_flatlora.flatness import MEASURES

ALL_BUT_EMA = [name for name in MEASURES if name != "ema"]


class Recorder(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    @property
    def measured(self) -> list[dict[str, float]]:
        """The monitor's rows, without the common prefix."""
        measured = []
        for _, row in self.rows:
            if any(name.startswith("flatness/") for name in row):
                measured.append({name.removeprefix("flatness/"): value for name, value in row.items()})
        return measured


def measured(tmp_path: Any, module: Any, callbacks: list[Any], *loader: Any, **settings: Any) -> list[dict[str, float]]:
    """What the monitor among the callbacks logs during a run."""
    logger = Recorder()
    fit(tmp_path, module, callbacks, *loader, **{"logger": logger, "log_every_n_steps": 1} | settings)
    return logger.measured


class KeepsPoints(FlatnessMonitor):
    """Keeps the point of each measurement, with the optimizer step and the batch (6 per epoch)."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.points: list[tuple[int, int, Any]] = []

    def _point(self, trainer: Any, *args: Any) -> Any:
        point = super()._point(trainer, *args)
        self.points.append(
            (trainer.global_step, trainer.current_epoch * 6 + trainer.fit_loop.epoch_loop.batch_idx, point)
        )
        return point
