"""Kill training processes at chosen moments, and resume from what they left.

Processes are forked from this one, which has imported everything and computes nothing: they start at once.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
from checkpoint_runs import loader, trainer_of
from fits import ShardedAutomatic
from float64_runs import BETA, RHO, network
from strategies import full_weights

from lightning_flatlora import AdapterCheckpoint, EFMLoRA

STEPS, EVERY = 4, 2
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}


class Saver(AdapterCheckpoint):
    """Keeps the newest and the last, and notes outside of the folder which steps are completely saved."""

    done: Path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step % EVERY == 0 and trainer.is_global_zero:
            self.done.write_text(str(trainer.global_step))


def train(folder: Path, strategy: str, kill: dict[str, Any] | None, resume: bool) -> None:
    """What a process does: train four steps, save every second, and die when it has to."""
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
    """Die as a "step" begins or in its "forward", or before a file is "renamed"; or "copy" what a kill would leave.

    Or have the torchrun that has started this process "terminated", before a file is renamed. Or let no file grow
    "full", beyond a size, from a step on.
    """
    if kill["at"] in ("step", "forward", "full"):
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
            if kill["at"] == "renamed":
                die()
            print("in a save", flush=True)
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)

    sys.addaudithook(hook)
    return []


class At(L.Callback):
    """Dies when a step begins, or in the middle of its forward; or has a full disk from then on."""

    def __init__(self, step: int, at: str, rank: int = 0, size: int = 0) -> None:
        self.step, self.at, self.size = step, at, size

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.at == "step":
            die()
        elif self.at == "forward":
            last = [layer for layer in pl_module.net.modules() if isinstance(layer, torch.nn.Linear)][-1]
            last.register_forward_pre_hook(lambda *inputs: die())
        else:
            limit_files(self.size)


def fork(ranks: int, folder: Path, strategy: str, kill: Any, resume: bool = False) -> list[int]:
    """Train on forked processes, end the others soon after one has died, and return the signal that ended each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: dict[int, int] = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_child(rank, ranks, port, folder, (strategy, kill, resume))
        running[pid] = rank
    ends, deadline = [0] * ranks, time.monotonic() + 60
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ends[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:
                deadline = min(deadline, time.monotonic() + 1.0)  # as torchrun does, after a while
        elif time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline += 60
        else:
            time.sleep(0.01)
    return ends


def _be_child(rank: int, ranks: int, port: int, folder: Path, how: tuple[Any, ...]) -> None:
    code = 1
    try:
        if ranks > 1:
            elastic = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "GROUP_RANK": 0,
            }
            elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "crash"}
            os.environ.update({key: str(value) for key, value in elastic.items()})
        train(folder, *how)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> None:
    ends: dict[str, Any] = {}
    for name, (ranks, strategy, kill) in json.loads((folder / "plan.json").read_text()).items():
        ends[name] = fork(ranks, folder / name, strategy, kill)
        if kill and kill["at"] != "copy":
            (folder / f"{name}.left").write_text(json.dumps(_listing(folder / name)))
            ends[f"{name}-resumed"] = fork(ranks, folder / name, strategy, None, resume=True)
    (folder / "ends.json").write_text(json.dumps(ends))


def _listing(folder: Path) -> dict[str, int]:
    """The step of each checkpoint in a folder, -1 if it can't be read, and the last step known to be saved."""
    steps = {file.name: _step(file) for file in folder.glob("*.ckpt")}
    return {**steps, "saved": int(folder.with_suffix(".saved").read_text())}


def _step(file: Path) -> int:
    try:
        return int(torch.load(file, weights_only=True)["global_step"])
    except Exception:
        return -1


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size, of -1 for any; writing more is an error, as on a full disk."""
    _, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, highest))


def train_on_a_full_disk(folder: Path, size: int) -> None:
    """What a process does: its second save fails."""
    try:
        train(folder, "single", {"at": "full", "step": 3, "size": size, "rank": 0}, resume=False)
    finally:
        limit_files(-1)  # what it writes of the error goes into a file, too


def train_or_resume(folder: Path, strategy: str, kill: dict[str, Any] | None) -> None:
    """What torchrun starts, and starts again; it is killed once."""
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train(folder, strategy, kill if is_first else None, resume=(folder / "last.ckpt").exists())


if __name__ == "__main__":
    train_or_resume(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
