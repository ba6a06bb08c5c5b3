"""What a log shows during long work: how far it is, and when it is done."""

import warnings

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from lightning_utilities.core import rank_zero

from recipes.command_line import progress as progress_module
from recipes.command_line.progress import ProgressLines, progress, progress_bar, without_hints


def test_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 100, 4))  # four seconds between looks
    monkeypatch.setattr(progress_module, "monotonic", lambda: next(times))
    with progress("Work", 8) as bar:
        for _ in range(8):
            bar.update()
            bar.refresh()
    shown = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown if line] == ["Work: 2 of 8", "Work: 5 of 8", "Work: 8 of 8"]


def test_a_log_gets_lines_and_a_terminal_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(progress_bar("LoRA"), ProgressLines)
    monkeypatch.setattr(progress_module, "is_live", lambda: True)
    assert isinstance(progress_bar("LoRA"), RichProgressBar)
    with progress("Work", 1) as bar:
        bar.update()
    assert "1/1" in capsys.readouterr().out


def test_each_epoch_has_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Work", 2) as bar:
        for _ in range(3):
            bar.reset()
            bar.update(2)
            bar.refresh()
    assert capsys.readouterr().out.count("2 of 2") == 3


def test_what_others_say_in_every_run_is_silent_and_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_hints()
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", UserWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="is deprecated"):
            warnings.warn("This argument is deprecated", UserWarning, stacklevel=1)


def test_a_trainers_tips_are_silent_and_its_other_lines_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero.log, "filters", [])
    L.Trainer(accelerator="cpu", logger=False)
    assert any("Tip" in message for message in caplog.messages)
    caplog.clear()
    without_hints()
    L.Trainer(accelerator="cpu", logger=False)
    assert any(message.startswith("GPU available") for message in caplog.messages)
    assert not any("Tip" in message or "TPU" in message for message in caplog.messages)
