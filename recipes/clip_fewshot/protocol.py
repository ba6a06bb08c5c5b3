"""The protocol around training: zero-shot accuracy before, the test after, and the cost of a step."""

import json
import statistics
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm
from typing_extensions import override

from recipes.clip_fewshot.evaluation import write_evaluation
from recipes.data.files import set_aside, write_whole
from recipes.studies.process import commit
from recipes.training.modes import evaluating
from recipes.training.predictions import run_folder
from recipes.training.step_times import StepTimes


class Protocol(StepTimes):
    """Tests before the first step and after the last, inside `fit`, where every strategy has its model set up.

    Logs ``zero_shot_accuracy`` and the other metrics, and ``test_...`` with the last step's weights. Writes
    ``zero_shot.json``, ``test.json``, their confusion matrices and ``result.json``, a summary, into the run's folder. A
    resumed run keeps its earlier measurements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zero_shot: dict[str, float] = {}
        self.validation: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.zero_shot = evaluated(trainer, "zero_shot")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Kept, since a run resumed after its last validation has no other.
        metrics = trainer.callback_metrics.items()
        self.validation = {
            name.removeprefix("val_"): value.item() for name, value in metrics if name.startswith("val_")
        }

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        test = evaluated(trainer, "test")
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        cuda = module.device.type == "cuda"
        result = {
            **{name: getattr(data, name) for name in ("dataset", "split", "shots", "seed", "batch_size")},
            **{name: getattr(module, name) for name in ("pretrained", "lora")},
            "model": module.model_name,
            "classes": len(data.classes),
            "device": torch.cuda.get_device_name(module.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
            "devices": trainer.world_size,
            "commit": commit(),
            "steps": trainer.global_step,
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
            "zero_shot": self.zero_shot,
            "validation": self.validation,
            "test": test,
        }
        folder = run_folder(trainer)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            set_aside(folder / "result.json")
            write_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")
        rank_zero_info(f"Accuracy {test['accuracy']:.4f}, zero-shot {self.zero_shot.get('accuracy', float('nan')):.4f}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "zero_shot": self.zero_shot, "validation": self.validation}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.zero_shot = state_dict["zero_shot"]
        self.validation = state_dict["validation"]


def evaluated(trainer: L.Trainer, name: str) -> dict[str, float]:
    """Return the metrics of the test part with the current weights; every rank must call it, during training.

    A fast_dev_run takes as few batches here as elsewhere.

    Args:
        trainer: the Trainer, during its `fit`.
        name: prefix of the logged metrics and of the files.
    """
    module: Any = trainer.lightning_module
    data, strategy = trainer.datamodule, trainer.strategy  # type: ignore[attr-defined]
    loader = data.test_dataloader()
    total = getattr(trainer, "fast_dev_run", 0) or len(loader)
    shown = tqdm(islice(loader, total), desc=name, total=total, disable=not trainer.is_global_zero, leave=False)
    with torch.no_grad(), evaluating(module):
        for number, batch in enumerate(shown):
            # Through the strategy, whose wrapped model gathers sharded weights; trainer.test would set everything up
            # again during the fit.
            strategy.test_step(strategy.batch_to_device(batch), number)
    values, confusion = module.metrics["test"].take()
    for logger in trainer.loggers:
        logger.log_metrics({f"{name}_{key}": value.item() for key, value in values.items()}, step=trainer.global_step)
    write_evaluation(trainer, name, values, confusion, module.classes)
    return {key: value.item() for key, value in values.items()}
