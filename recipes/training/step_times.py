"""Time each training step, without the loading of its data."""

import statistics
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override


class StepTimes(L.Callback):
    """Measures each batch from its start until the device is idle again; prints the median after training.

    Attributes:
        seconds: one per batch so far, including those before a resume.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = idle_time(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(idle_time(pl_module.device) - self._start)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.seconds:
            milliseconds = 1e3 * statistics.median(self.seconds)
            rank_zero_info(f"Median step: {milliseconds:.1f} ms, of {len(self.seconds)}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = list(state_dict["seconds"])


def idle_time(device: torch.device) -> float:
    """Return the time in seconds, once a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
