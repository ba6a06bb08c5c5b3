"""How long each training step takes, without its data's loading."""

import statistics
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

Mark = float | torch.cuda.Event


class StepTimes(L.Callback):
    """Seconds from each batch's start to its end, of the device that computes; training ends with the median's line.

    A GPU notes the times itself, so that training never waits for it; they are read when ``seconds`` is asked for.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._unread: list[tuple[Mark, Mark]] = []
        self._start: Mark = 0.0

    @property
    def seconds(self) -> list[float]:
        """Of all steps so far, those before a resume included."""
        self._seconds += [_between(start, end) for start, end in self._unread]
        self._unread = []
        return self._seconds

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = _mark(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._unread.append((self._start, _mark(pl_module.device)))

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
        self._seconds, self._unread = list(state_dict["seconds"]), []


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        # The host may be ahead of the GPU, and an event has no time before it has happened.
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
