"""The demo from its command line, on a tiny model: it reports, keeps what is finished, and resumes after Ctrl-C."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.demo.__main__ import main
from recipes.demo.run import Run, Settings, ledger
from recipes.shared.ledger import StoppedError
from recipes.shared.step_times import StepTimes

METHODS = ("untuned", "LoRA", "EFMLoRA", "FMLoRA")


def command(folder: Path, model: str, *more: str) -> list[str]:
    small = ("--dataset=packaged:openbook_qa", "--max_length=256", "--batch_size=4", "--test_batches=2")
    return [f"--folder={folder}", f"--model={model}", *small, "--sharpness_batches=2", *more]


def in_this_process(arguments: Sequence[str]) -> None:
    """What a process of one method does, and what the demo learns of its end."""
    try:
        main(list(arguments[3:]))
    except SystemExit as end:  # into which Lightning turns Ctrl-C
        raise StoppedError(130) from end


def test_demo_reports_resumes_and_keeps(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "demo", "--steps=10"
    monkeypatch.setattr("recipes.demo.__main__.run_process", in_this_process)
    begun: list[int] = []
    begins = StepTimes.on_train_batch_start

    def interrupted(self: StepTimes, trainer: Any, *args: Any) -> None:
        begun.append(trainer.global_step)
        if len(begun) == 9:  # a checkpoint of LoRA's is saved after the eighth step
            raise KeyboardInterrupt
        begins(self, trainer, *args)

    monkeypatch.setattr(StepTimes, "on_train_batch_start", interrupted)
    assert main(command(folder, tiny, steps)) == 130
    assert "The same command resumes" in capsys.readouterr().out
    untuned = (folder / "untuned" / "result.json").stat().st_mtime_ns

    assert main(command(folder, tiny, steps)) == 0
    assert begun[:11] == [*range(9), 8, 9]
    out = capsys.readouterr().out
    assert "EFMLoRA, Epoch 0: 10 of 10" in out  # not at a terminal, but not silent
    assert "FMLoRA, sharpness, batches: 4 of 4" in out
    assert (folder / "untuned" / "result.json").stat().st_mtime_ns == untuned
    results = {method: json.loads((folder / method / "result.json").read_text()) for method in METHODS}
    assert all(method in (folder / "table.txt").read_text() for method in results)
    assert len({result["test_loss"] for result in results.values()}) == 4  # every method did something of its own
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "EFMLoRA" / "last" / "adapter_model.safetensors").exists()

    assert main(command(folder, tiny, steps)) == 0
    assert "[2/4]" not in capsys.readouterr().out  # nothing is trained again

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.demo.__main__.tokenize", stop)
    assert main(command(folder, tiny, "--steps=2")) == 130
    assert (tmp_path / "demo-1" / "table.txt").exists()  # results of other settings are set aside, not overwritten


def test_other_settings_leave_a_running_demo_its_folder(tmp_path: Path, tiny: str) -> None:
    earlier = json.dumps({"precision": "32-true"})
    (tmp_path / "settings.json").write_text(earlier)
    run = Run("LoRA", Settings(), tmp_path / "LoRA")
    with ledger(tmp_path).claimed(run), pytest.raises(MisconfigurationException, match="demo with other settings"):
        main(command(tmp_path, tiny))
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(tmp_path.name)] == [tmp_path.name]
    assert (tmp_path / "settings.json").read_text() == earlier
