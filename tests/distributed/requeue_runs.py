"""Runs on several processes that a signal to one of them ends, and that come back."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from checkpoint_runs import loader, local_optimizer, trainer_of
from fits import ShardedAutomatic
from float64_runs import BETA, RHO, loss, network
from strategies import full_weights
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, CosineRho, EFMLoRA, Requeue


class Validated(ShardedAutomatic):
    """With a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch), sync_dist=True)


class Send(L.Callback):
    """Sends one rank's process a signal in a hook, in one of its calls."""

    def __init__(self, rank: int, hook: str, call: int) -> None:
        self.calls: list[None] = []

        def method(*args: Any) -> None:
            self.calls.append(None)
            if len(self.calls) == call and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), signal.SIGUSR1)

        setattr(self, hook, method)


def train(
    folder: str, strategy: str, send: tuple[int, str, int] | None = None, sizes: tuple[int, ...] = (3, 3)
) -> dict[str, Any]:
    """Train as often as it takes, and return what the last start ends with, and how often each hook was called."""
    os.environ["SLURM_JOB_ID"] = "77"
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    own = loader().batches[: sizes[int(os.environ["RANK"])]]
    validation: DataLoader[Any] = DataLoader(own, batch_size=None)
    ends: list[Any] = []
    done: list[str] = []
    resume: str | None = None
    while True:
        driver, module = EFMLoRA(CosineRho(RHO, 0.1), beta=BETA), Validated(network())
        saver = AdapterCheckpoint(Path(folder, "saved"), monitor="val_loss", save_last=True)
        callbacks = [Requeue(), driver, *([Send(*send)] if send and not ends else []), Counts(done), saver]
        trainer = trainer_of(strategy, callbacks, num_sanity_val_steps=0)
        try:
            trainer.fit(module, loader(), validation, ckpt_path=resume)
            break
        except SystemExit as end:
            ends.append((end.code, trainer.global_step))
            resume = "last"
    return {
        "weights": full_weights(trainer.strategy, module.net),
        "optimizer": local_optimizer(trainer.optimizers[0]),
        "driver": driver.state_dict(),
        "steps": trainer.global_step,
        "ends": ends,
        "done": done,
        "best": Path(saver.best_model_path).name,
        "val_loss": torch.as_tensor(trainer.callback_metrics["val_loss"]),
    }


class Counts(L.Callback):
    """Notes what is done, over all starts."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def on_train_batch_end(self, *args: Any) -> None:
        self.done.append("batch")

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.done.append("validation")
