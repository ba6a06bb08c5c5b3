"""Step times: one for each batch, kept over a resume."""

from typing import Any

import torch
from lightning.pytorch import LightningModule

from recipes.shared.step_times import StepTimes


def timed(steps: int) -> StepTimes:
    times, module = StepTimes(), LightningModule()
    trainer: Any = None
    for number in range(steps):
        times.on_train_batch_start(trainer, module, None, number)
        torch.randn(200, 200) @ torch.randn(200, 200)
        times.on_train_batch_end(trainer, module, None, None, number)
    return times


def test_every_step_has_a_time_and_a_resume_keeps_them() -> None:
    times = timed(3)
    assert len(times.seconds) == 3
    assert all(0 < seconds < 10 for seconds in times.seconds)
    resumed = timed(1)
    resumed.load_state_dict(times.state_dict())
    assert resumed.seconds == times.seconds
