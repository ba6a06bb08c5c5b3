"""The demo from its command line, on a tiny model: it reports, keeps what is finished, and resumes after Ctrl-C."""

import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import demo_runs
import processes
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.demo.__main__ import main
from recipes.demo.run import Run, Settings, ledger, train
from recipes.shared.step_times import StepTimes

METHODS = ("untuned", "LoRA", "EFMLoRA", "FMLoRA")


def command(folder: Path, model: str, *more: str) -> list[str]:
    small = ("--dataset=packaged:openbook_qa", "--max_length=256", "--batch_size=4", "--test_batches=2")
    return [f"--folder={folder}", f"--model={model}", *small, "--sharpness_batches=2", *more]


@pytest.mark.timeout(900)
def test_demo_reports_resumes_and_keeps(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    output = tmp_path / "interrupted.txt"
    interrupted = processes.start(demo_runs.main, command(folder, tiny, "--steps=10"), output=output)
    _wait_for(folder / "LoRA" / "last.ckpt", interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # Ctrl-C reaches the whole group, as in a terminal
    interrupted.join(timeout=120)
    said = output.read_text()
    finished_early = (folder / "LoRA" / "result.json").exists()
    assert finished_early or "resumes from the last checkpoint" in said
    untuned = (folder / "untuned" / "result.json").stat().st_mtime_ns

    # In this process, without another import of the libraries for each method.
    monkeypatch.setattr("recipes.demo.__main__.run_process", lambda command: main(list(command[3:])))
    assert main(command(folder, tiny, "--steps=10")) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith(str(folder))
    for line in (
        "EFMLoRA, training steps: 10 of 10",
        "FMLoRA, test batches: 2 of 2",
        "FMLoRA, sharpness, batches: 4 of 4",
    ):
        assert line in out  # not at a terminal, but not silent
    assert "untuned, test batches: 2 of 2" in said
    assert "Precision: " in said
    kept = json.loads((folder / "settings.json").read_text())["precision"]
    assert kept in (folder / "table.txt").read_text()
    assert (folder / "untuned" / "result.json").stat().st_mtime_ns == untuned
    results = {method: json.loads((folder / method / "result.json").read_text()) for method in METHODS}
    for method, result in results.items():
        assert method in (folder / "table.txt").read_text()
        assert 0 <= result["test_accuracy"] <= 1
        assert result["sharpness"] != 0
    assert len({result["test_loss"] for result in results.values()}) == 4  # every method did something of its own
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "EFMLoRA" / "last" / "adapter_model.safetensors").exists()

    assert main(command(folder, tiny, "--steps=10")) == 0
    assert "[2/4]" not in capsys.readouterr().out  # nothing is trained again

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.demo.__main__.tokenize", stop)
    with pytest.raises(KeyboardInterrupt):
        main(command(folder, tiny, "--steps=2"))
    assert (tmp_path / "demo-1" / "table.txt").exists()  # results of other settings are set aside, not overwritten


def _wait_for(path: Path, process: BaseProcess) -> None:
    for _ in range(3000):
        if path.exists() or process.exitcode is not None:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_other_settings_leave_a_running_demo_its_folder(tmp_path: Path, tiny: str) -> None:
    earlier = json.dumps({"precision": "32-true"})
    (tmp_path / "settings.json").write_text(earlier)
    run = Run("LoRA", Settings(), tmp_path / "LoRA")
    with ledger(tmp_path).claimed(run), pytest.raises(MisconfigurationException, match="demo with other settings"):
        main(command(tmp_path, tiny))
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(tmp_path.name)] == [tmp_path.name]
    assert (tmp_path / "settings.json").read_text() == earlier


def test_training_goes_on_from_the_last_checkpoint(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"dataset": "packaged:openbook_qa", "model": tiny, "max_length": 256, "batch_size": 4, "test_batches": 2}
    run = Run("LoRA", Settings(**short, steps=10, precision="32-true"), tmp_path / "LoRA")
    begun: list[int] = []
    real = StepTimes.on_train_batch_start

    def begins(self: StepTimes, trainer: Any, *args: Any) -> None:
        begun.append(trainer.global_step)
        if len(begun) == 9:  # a checkpoint is saved after the eighth step
            raise ZeroDivisionError
        real(self, trainer, *args)

    monkeypatch.setattr(StepTimes, "on_train_batch_start", begins)
    with pytest.raises(ZeroDivisionError):
        train(run)
    train(run)
    assert begun == [*range(9), 8, 9]
