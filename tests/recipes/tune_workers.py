"""A worker of ``recipes.tune`` in its own process, and the small LightningCLI that it runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import processes
import torch
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

ROOM = "FLATLORA_WAITING_ROOM"
"""The variable with the folder in which a training leaves its process's id, and waits there for the file ``go``."""


class Classifier(L.LightningModule):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        self.lr = lr
        self.net = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        room = Path(os.environ[ROOM])
        (room / f"{os.getppid()}-{os.getpid()}").touch()
        while not (room / "go").exists():
            time.sleep(0.05)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        inputs = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
        self.parts = TensorDataset(inputs, inputs[:, :3].argmax(1))

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts, batch_size=32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts, batch_size=128)


class Forked:
    """Replaces ``subprocess.Popen([python, "-m", module, ...])`` by a fork of this process, which has all imports.

    Importing takes ten times as long as a run.
    """

    def __init__(self, command: Sequence[str], stdin: int, env: dict[str, str]) -> None:
        read, self.write = os.pipe()
        start = get_context("fork").Process
        self.process = start(target=self._run, args=(read, env, command[2:]))
        self.process.start()
        os.close(read)

    def _run(self, read: int, env: dict[str, str], command: Sequence[str]) -> None:
        os.close(self.write)
        os.dup2(read, 0)
        os.environ.update(env)
        processes.run_module(command[0], command[1:])

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.write)
        self.process.join()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a run", timeout or 0)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def work(arguments: Sequence[str]) -> None:
    """Do what ``python -m recipes.tune`` does, but soon take over what a killed worker has left."""
    from recipes.studies import process, queue
    from recipes.tune import __main__ as tune

    queue.HEARTBEAT, queue.GRACE = 1, 4
    process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # type: ignore[attr-defined]
    tune._printed_settings = lambda command, arguments: ""  # it would start a process; it is tested in test_tune.py
    sys.exit(tune.main(arguments))


if __name__ == "__main__":
    LightningCLI(Classifier, Data)
