"""Processes killed at any moment lose the steps since the last checkpoint and no more, and damage none."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import crashes as training
import pytest
import torch
from helpers import same
from launch import run_by_torchrun
from processes import run
from safetensors.torch import load_file

from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import HINT

KILLED = -signal.SIGKILL

WHOLE: dict[str, Any] = {kind: (2, kind, None) for kind in ("ddp", "fsdp2")}
KILLS: dict[str, Any] = {
    "one-between-steps": (2, "ddp", {"at": "step", "step": 3, "rank": 1}),
    "first-before-renaming": (2, "fsdp2", {"at": "renamed", "rank": 0}),
}
COPIED: dict[str, Any] = {"copied": (1, "single", {"at": "copy", "rank": 0})}


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folder of all runs, and how each process of them ended."""
    folder = tmp_path_factory.mktemp("crashes")
    (folder / "plan.json").write_text(json.dumps({**WHOLE, **KILLS, **COPIED}))
    output = folder / "output.txt"
    assert run(training.main, folder, output=output) == 0, output.read_text()[-3000:]
    return folder, json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_from_the_last_checkpoint(crashes: tuple[Path, Any], name: str) -> None:
    """Every file can be read, the last is not older than the last complete save, and the resumed run ends as ever."""
    folder, ends = crashes
    _, strategy, kill = KILLS[name]
    assert ends[name][kill["rank"]] == KILLED
    left = json.loads((folder / f"{name}.left").read_text())
    assert min(left.values()) >= left["saved"] == 2
    assert ends[f"{name}-resumed"] == [0, 0]
    ended, expected = (torch.load(folder / f"{run}.end", weights_only=True) for run in (name, strategy))
    assert same(ended, expected)


def by_torchrun(place: Path, strategy: str, kill: Any, **settings: Any) -> tuple[list[int | None], str]:
    """Train on two ranks, from the last checkpoint if there is one; torchrun's exit code, and what was written."""
    arguments = (place, strategy, json.dumps(kill))
    output = place.with_suffix(".txt")
    codes = run_by_torchrun(training.__file__, *arguments, ranks=2, output=output, timeout=120, **settings)
    return codes, output.read_text()


@pytest.mark.parametrize("strategy", WHOLE)
def test_torchrun_starts_ranks_again_that_are_killed_in_a_step(crashes: tuple[Path, Any], strategy: str) -> None:
    folder, _ = crashes
    place = folder / f"restarted-{strategy}"
    kill = {"at": "forward", "step": 3, "rank": 1}
    codes, said = by_torchrun(place, strategy, kill, restarts=1)
    assert codes == [0], said[-3000:]
    assert f"Restoring states from the checkpoint path at {place / 'last.ckpt'}" in said
    ended, expected = (torch.load(folder / f"{run}.end", weights_only=True) for run in (place.name, strategy))
    assert same(ended, expected)


@pytest.mark.parametrize("strategy", WHOLE)
def test_a_termination_within_a_save_leaves_the_former_checkpoint(crashes: tuple[Path, Any], strategy: str) -> None:
    """Torchrun is told to end, and ends its ranks; started again it ends with what no termination would change."""
    folder, _ = crashes
    place = folder / f"terminated-{strategy}"
    codes, said = by_torchrun(place, strategy, {"at": "terminated", "rank": 0})
    assert codes == [1], said[-3000:]
    assert "in a save" in said
    assert {file.name: content(file)["step"] for file in place.glob("*.ckpt")} == {"last.ckpt": 2, "step=2.ckpt": 2}
    codes, said = by_torchrun(place, strategy, None)
    assert codes == [0], said[-3000:]
    ended, expected = (torch.load(folder / f"{run}.end", weights_only=True) for run in (place.name, strategy))
    assert same(ended, expected)


@pytest.mark.parametrize("size", [100, 9000])
def test_a_full_disk_within_a_save_leaves_the_former_checkpoint(crashes: tuple[Path, Any], size: int) -> None:
    """Whether it is full at the adapter's first file or at the checkpoint's."""
    folder, _ = crashes
    place, output = folder / f"full-{size}", folder / f"full-{size}.txt"
    assert run(training.train_on_a_full_disk, place, size, output=output, timeout=60) == 1
    said = f"OSError: AdapterCheckpoint: could not write {place / 'step=4.ckpt'} (0.0 MB): [Errno 27] File too large"
    assert said in output.read_text()
    assert {path.name for path in place.iterdir()} == {"last", "last.ckpt", "step=2", "step=2.ckpt"}
    assert all(content(file)["step"] == step_of(file.with_suffix("")) == 2 for file in place.glob("*.ckpt"))
    assert run(training.train, place, "single", None, True, output=output, timeout=60) == 0
    ended, expected = (torch.load(folder / f"{run}.end", weights_only=True) for run in (place.name, "copied"))
    assert same(ended, expected)


def test_a_kill_before_any_change_of_the_folder_leaves_a_checkpoint(crashes: tuple[Path, Any]) -> None:
    """What is there before each file operation of a save is complete, and of the uninterrupted run.

    A folder is put in its place after its file, and says until then that it is of another step.
    """
    folder, ends = crashes
    assert ends["copied"] == [0]
    moments = list(folder.glob("copied-*"))
    assert len(moments) > 10
    expected = {2: content(folder / "copied-1" / "step=2.ckpt"), 4: content(folder / "copied" / "step=4.ckpt")}
    behind: list[Path] = []
    for moment in moments:
        assert (moment / "last.ckpt").exists(), moment.name
        for file in moment.glob("*.ckpt"):
            found = content(file)
            assert same(found, expected[found["step"]]), (moment.name, file.name)
            folder_of_file = file.with_suffix("")
            if step_of(folder_of_file) == found["step"]:
                adapter = load_file(folder_of_file / "adapter_model.safetensors")
                weights = {
                    re.sub(r"^net\.|\.modules_to_save|\.default", "", key): w for key, w in found["weights"].items()
                }
                assert same(adapter, weights), (moment.name, file.name)
            else:
                behind.append(moment)
    # Each save but the first of "last" is one of a new name, and one over an older folder.
    assert 0 < len(set(behind)) < len(moments) / 2


def step_of(folder: Path) -> int | None:
    """What a folder says of itself."""
    found = folder / LIST
    return int(json.loads(found.read_text())["step"]) if found.exists() else None


def content(file: Path) -> dict[str, Any]:
    checkpoint = torch.load(file, weights_only=True)
    return {
        "step": checkpoint["global_step"],
        "weights": {name: value for name, value in checkpoint["state_dict"].items() if name != HINT},
        "optimizer": checkpoint["optimizer_states"],
        "driver": checkpoint["callbacks"]["EFMLoRA"],
        "loops": checkpoint["loops"]["fit_loop"],
    }
