"""Step times: one for each batch, kept over a resume."""

from typing import Any

from lightning.pytorch import LightningModule

from recipes.shared.step_times import StepTimes


def test_every_step_has_a_time_and_a_resume_keeps_them() -> None:
    times: Any = StepTimes()
    for number in range(3):
        times.on_train_batch_start(None, LightningModule(), None, number)
        times.on_train_batch_end(None, LightningModule(), None, None, number)
    assert len(times.seconds) == 3
    assert all(0 <= seconds < 10 for seconds in times.seconds)
    resumed = StepTimes()
    resumed.load_state_dict(times.state_dict())
    assert resumed.seconds == times.seconds
