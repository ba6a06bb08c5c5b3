"""The results of a recipe's run for a study: a JSON file of the training, and one of the test."""

import json
import os
import statistics
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from recipes.data.files import write_whole
from recipes.studies.process import OF_WORKER
from recipes.studies.rows import Row
from recipes.training.step_times import StepTimes

OF_THE_CHOICE = ("best", "last", "monitor", "mode", "validations")
"""Entries of ``fit.json`` for choosing a checkpoint or a setting; the others belong in a row."""

_VERSIONS = ("torch", "lightning", "transformers", "peft", "lightning-flatlora")


class RunResult(StepTimes):
    """Writes ``fit.json``, with all validations, after training and ``test.json`` after a test.

    A resumed run keeps its earlier validations and its time so far. If the worker that started the run is killed, the
    run ends too, since another worker will do it.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.validations: list[Row] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if OF_WORKER in os.environ:
            threading.Thread(target=end_with_worker, daemon=True).start()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            now = {"step": trainer.global_step, "epoch": trainer.current_epoch}
            self.validations.append({**now, **_logged(trainer)})

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The callback that keeps the best checkpoint by a metric tells how the run is judged.
        savers: list[Any] = trainer.checkpoint_callbacks
        monitored = next((each for each in savers if getattr(each, "monitor", None) is not None), None)
        saver: Any = monitored or trainer.checkpoint_callback
        cuda = pl_module.device.type == "cuda"
        fitted = {
            "steps": trainer.global_step,
            "training_seconds": sum(self.seconds),
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
            "versions": {name: version(name) for name in _VERSIONS},
            "validations": self.validations,
            "best": saver.best_model_path if saver else None,
            "last": saver.last_model_path if saver else None,
            "monitor": monitored.monitor if monitored else None,
            "mode": monitored.mode if monitored else None,
        }
        self._write(trainer, "fit", fitted)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", _logged(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "validations": self.validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.validations = list(state_dict["validations"])

    def _write(self, trainer: L.Trainer, name: str, found: Row) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{name}.json", json.dumps(found, indent=2) + "\n")


def _logged(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def end_with_worker() -> None:
    """End this process when the worker that started it has ended, for whatever reason.

    The worker holds the other end of this process's input, which the ranks of a run share.
    """
    # Not through sys.stdin, whose lock a thread must not hold when Python ends.
    while os.read(0, 1):
        pass
    os._exit(1)
