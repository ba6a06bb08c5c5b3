"""A run that SLURM signals in the middle, and that comes back when its job is requeued."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning as L
from checkpoint_runs import BATCHES, loader, trainer_of
from fits import ShardedAutomatic
from float64_runs import BETA, RHO, network
from strategies import full_weights

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, Requeue

EPOCHS, SIGNALLED = 17, 8
STEPS = EPOCHS * BATCHES


class Signals(L.Callback):
    """At a step has SLURM signal the job, if the run has not come back; further steps take so long that it arrives."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.began or trainer.global_step < SIGNALLED:
            return
        if trainer.global_step == SIGNALLED and trainer.is_global_zero:
            subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(0.05)


def train(folder: str, strategy: str) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; "single" is one process without a signal."""
    signals, driver, module = Signals(), EFMLoRA(RHO, beta=BETA), ShardedAutomatic(network())
    saver = AdapterCheckpoint(Path(folder), save_top_k=0, save_last=True)
    callbacks: list[L.Callback] = [driver, saver]
    if strategy != "single":
        callbacks += [Requeue(), signals]
    trainer = trainer_of(strategy, callbacks, max_epochs=EPOCHS)
    trainer.fit(module, loader(), ckpt_path="last")
    weights, E = full_weights(trainer.strategy, module.net), driver.perturbation.state_dict()["E"]
    return {"weights": weights, "E": E, "steps": trainer.global_step, "began": getattr(signals, "began", 0)}
