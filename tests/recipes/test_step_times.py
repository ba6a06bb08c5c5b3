"""Step times: one for each batch, kept over a resume, and without a wait for a GPU."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from recipes.shared.step_times import StepTimes


def timed(device: str, steps: int) -> StepTimes:
    times, module = StepTimes(), LightningModule().to(device)
    trainer: Any = None
    for number in range(steps):
        times.on_train_batch_start(trainer, module, None, number)
        torch.randn(200, 200, device=device) @ torch.randn(200, 200, device=device)
        times.on_train_batch_end(trainer, module, None, None, number)
    return times


def test_every_step_has_a_time_and_a_resume_keeps_them() -> None:
    times = timed("cpu", 3)
    assert len(times.seconds) == 3
    assert all(0 < seconds < 10 for seconds in times.seconds)
    resumed = timed("cpu", 1)
    resumed.load_state_dict(times.state_dict())
    assert resumed.seconds == times.seconds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    timed("cuda", 1)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        times = timed("cuda", 3)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert len(times.seconds) == 3
    assert all(0 < seconds < 10 for seconds in times.seconds)
