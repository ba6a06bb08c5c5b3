"""Resident memory of a process, as Linux counts it."""

from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override


class Watch(L.Callback):
    """Resident memory of this process after the first step, and its peak in those that follow, in bytes."""

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:  # AdamW has its state, and the perturbation is there
            self.held = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # from here on the kernel looks for the peak anew

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.peak = resident("VmHWM")


def resident(field: str) -> int:
    """What the kernel reports about the memory of this process, "VmRSS" now or "VmHWM" at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
