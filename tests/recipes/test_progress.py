"""What a log shows of long work: that it has begun, how far it is, and that it is done."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from peft import LoraConfig, get_peft_model

from lightning_flatlora import FMLoRAModule
from recipes.shared import progress as progress_module
from recipes.shared.progress import Lines, ProgressLines, progress, progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by four seconds with every look."""
    now = [0.0]

    def look() -> float:
        now[0] += 4.0
        return now[0]

    monkeypatch.setattr(progress_module, "monotonic", look)
    return now


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "monotonic", lambda: 0.0)


def test_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("Work", total=8, done=1)
    for _ in range(7):
        lines.advance("loss 0.5")
    told = [
        "Work: 1 of 8",
        "Work: 4 of 8, 12 s, about 16 s left, loss 0.5",
        "Work: 7 of 8, 24 s, about 4 s left, loss 0.5",
    ]
    assert capsys.readouterr().out.splitlines() == [*told, "Work: 8 of 8, 28 s, loss 0.5"]


@pytest.mark.usefixtures("stopped_clock")
def test_a_log_gets_lines_and_a_terminal_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(progress_bar("LoRA"), ProgressLines)
    with progress("Work", 1) as advance:
        advance()
    assert capsys.readouterr().out.splitlines() == ["Work: 0 of 1", "Work: 1 of 1, 0 s"]
    monkeypatch.setattr(progress_module, "is_live", lambda: True)
    assert isinstance(progress_bar("LoRA"), RichProgressBar)
    with progress("Work", 1) as advance:
        advance()
    assert "1/1" in capsys.readouterr().out


class OwnWindows(FMLoRAModule):
    """Two batches a step, which the trainer does not know of."""

    def __init__(self) -> None:
        super().__init__(rho=0.1, accumulate_grad_batches=2)
        self.net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))

    def compute_loss(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize(("max_steps", "steps"), [(-1, 4), (3, 3)])
def test_the_windows_of_a_module_of_its_own_are_counted(
    max_steps: int, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressLines("LoRA")],
    )
    trainer.fit(OwnWindows(), torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=1))
    assert f"training steps: {steps} of {steps}" in capsys.readouterr().out
