"""Processes killed at any moment only lose the steps since the last checkpoint, and damage no checkpoint.

torchrun runs this file as a training program.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpoint_runs import loader, trainer_of
from fits import ShardedAutomatic, full_weights
from float64_runs import BETA, RHO, network
from helpers import same
from launch import run_by_torchrun, run_on
from processes import run
from safetensors.torch import load_file

from lightning_flatlora import AdapterCheckpoint, EFMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import HINT

STEPS, EVERY = 4, 2
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}
STRATEGIES = ("ddp", "fsdp2")
# -- the runs


class Saver(AdapterCheckpoint):
    """Keeps the newest and the last checkpoint, and notes outside of the folder which step was saved completely."""

    done: Path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step % EVERY == 0 and trainer.is_global_zero:
            self.done.write_text(str(trainer.global_step))


def train(folder: Path, strategy: str, kill: dict[str, Any] | None = None, resume: bool = False) -> None:
    """Train four steps in one process, save every second one, and die at the requested moment."""
    torch.set_num_threads(1)
    saver = Saver(folder, filename="{step}", save_top_k=1, save_last=True, every_n_train_steps=EVERY)
    saver.done = folder.with_suffix(".saved")
    driver, module = EFMLoRA(RHO, beta=BETA), ShardedAutomatic(network())
    callbacks: list[L.Callback] = [driver, saver]
    if kill and kill["rank"] == int(os.environ.get("RANK", 0)):
        callbacks += arm(kill, folder)
    trainer = trainer_of(strategy, callbacks, max_steps=STEPS)
    trainer.fit(module, loader(), ckpt_path="last" if resume else None)
    result = {"weights": full_weights(trainer.strategy, module.net), "driver": driver.state_dict()}
    if trainer.is_global_zero:
        torch.save(result, folder.with_suffix(".end"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: dict[str, Any], folder: Path) -> list[L.Callback]:
    """Prepare to die in a step's "forward", or to "copy" the folder as a kill would leave it.

    Or to have the torchrun that started this process "terminated" before a file is renamed. Or, from a step on, to let
    no file grow beyond a size, as on a "full" disk.
    """
    if kill["at"] in ("forward", "full"):
        return [At(**kill)]
    numbers = iter(range(1, 10000))

    def hook(event: str, args: Any) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(args[1], str) and "w" in args[1])
        ours = changes and any(f"{folder}/" in f"{arg}/" for arg in args[:2])
        if not ours or not folder.with_suffix(".saved").exists():
            return
        if kill["at"] == "copy":
            shutil.copytree(folder, folder.with_name(f"{folder.name}-{next(numbers)}"), symlinks=True)
        elif event == "os.rename" and str(args[1]).endswith(".ckpt"):
            print("in a save", flush=True)
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)

    sys.addaudithook(hook)
    return []


class At(L.Callback):
    """Dies in the middle of a step's forward pass, or has a full disk from that step on."""

    def __init__(self, step: int, at: str, rank: int = 0, size: int = 0) -> None:
        self.step, self.at, self.size = step, at, size

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.at == "forward":
            last = [layer for layer in pl_module.net.modules() if isinstance(layer, torch.nn.Linear)][-1]
            last.register_forward_pre_hook(lambda *inputs: die())
        else:
            limit_files(self.size)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size (-1: no limit); writing more is an error, as on a full disk."""
    _, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, highest))


def train_on_a_full_disk(folder: Path, size: int) -> None:
    """Train in one process, whose second save fails."""
    try:
        train(folder, "single", {"at": "full", "step": 3, "size": size, "rank": 0}, resume=False)
    finally:
        limit_files(-1)  # the error's traceback is written to a file, too


def train_or_resume(folder: Path, strategy: str, kill: dict[str, Any] | None) -> None:
    """Train in a process of torchrun; only its first start is killed."""
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train(folder, strategy, kill if is_first else None, resume=(folder / "last.ckpt").exists())


# -- the tests


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of uninterrupted runs; one of them copies its own folder before each change."""
    folder = tmp_path_factory.mktemp("crashes")
    for strategy in STRATEGIES:
        assert run_on(2, train, folder / strategy, strategy, output=folder / "output.txt") == [0, 0]
    copies = {"at": "copy", "rank": 0}
    assert run(train, folder / "copied", "single", copies, output=folder / "output.txt") == 0
    return folder


def assert_same_end(folder: Path, name: str, expected: str) -> None:
    assert same(*(torch.load(folder / f"{run}.end", weights_only=True) for run in (name, expected)))


def by_torchrun(place: Path, strategy: str, kill: Any, **settings: Any) -> tuple[list[int | None], str]:
    """Train on two ranks, from the last checkpoint if there is one; returns torchrun's exit code and the output."""
    arguments = (place, strategy, json.dumps(kill))
    output = place.with_suffix(".txt")
    codes = run_by_torchrun(__file__, *arguments, ranks=2, output=output, timeout=120, **settings)
    return codes, output.read_text()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_starts_ranks_again_that_are_killed_in_a_step(whole: Path, strategy: str) -> None:
    place = whole / f"restarted-{strategy}"
    kill = {"at": "forward", "step": 3, "rank": 1}
    codes, said = by_torchrun(place, strategy, kill, restarts=1)
    assert codes == [0], said[-3000:]
    assert f"Restoring states from the checkpoint path at {place / 'last.ckpt'}" in said
    assert_same_end(whole, place.name, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_termination_within_a_save_leaves_the_former_checkpoint(whole: Path, strategy: str) -> None:
    """torchrun is told to end, and ends its ranks; started again, it ends like an uninterrupted run."""
    place = whole / f"terminated-{strategy}"
    codes, said = by_torchrun(place, strategy, {"at": "terminated", "rank": 0})
    assert codes == [1], said[-3000:]
    assert "in a save" in said
    assert {file.name: content(file)["step"] for file in place.glob("*.ckpt")} == {"last.ckpt": 2, "step=2.ckpt": 2}
    codes, said = by_torchrun(place, strategy, None)
    assert codes == [0], said[-3000:]
    assert_same_end(whole, place.name, strategy)


@pytest.mark.parametrize("size", [100, 9000])
def test_a_full_disk_within_a_save_leaves_the_former_checkpoint(whole: Path, size: int) -> None:
    """Whether the disk fills up at the adapter's first file or at the checkpoint."""
    place, output = whole / f"full-{size}", whole / f"full-{size}.txt"
    assert run(train_on_a_full_disk, place, size, output=output, timeout=60) == 1
    said = f"OSError: AdapterCheckpoint: could not write {place / 'step=4.ckpt'} (0.0 MB): [Errno 27] File too large"
    assert said in output.read_text()
    assert {path.name for path in place.iterdir()} == {"last", "last.ckpt", "step=2", "step=2.ckpt"}
    assert all(content(file)["step"] == step_of(file.with_suffix("")) == 2 for file in place.glob("*.ckpt"))
    assert run(train, place, "single", None, True, output=output, timeout=60) == 0
    assert_same_end(whole, place.name, "copied")


def test_a_kill_before_any_change_of_the_folder_leaves_a_checkpoint(whole: Path) -> None:
    """Before each file operation of a save, what is there is complete and equals the uninterrupted run.

    A folder is put in place after its file; until then its content says that it belongs to another step.
    """
    moments = list(whole.glob("copied-*"))
    assert len(moments) > 10
    expected = {2: content(whole / "copied-1" / "step=2.ckpt"), 4: content(whole / "copied" / "step=4.ckpt")}
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
    # Each save but the first has one under a new name, and that of "last", with an older folder.
    assert 0 < len(set(behind)) < len(moments) / 2


def step_of(folder: Path) -> int | None:
    """The step that a folder says it is of."""
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


if __name__ == "__main__":
    train_or_resume(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
