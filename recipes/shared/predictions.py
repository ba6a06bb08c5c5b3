"""Where a run leaves its files, and the file of what it predicts."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.shared.files import set_aside
from recipes.shared.ranks import gathered


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run leaves its files. Every rank has to ask: they agree on it then."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class PredictionWriter(L.Callback):
    """Write what is predicted of each example into the run's folder: all ranks' into one file, in the examples' order.

    A batch holds ``places``, its examples' numbers from 0, and a predict_step returns a mapping for each.

    Args:
        name: of the file; .jsonl or .csv.
        examples: what to call them when the file is written, such as "images".

    Raises:
        MisconfigurationException: another ending.
    """

    def __init__(self, name: str, examples: str) -> None:
        if not name.endswith((".jsonl", ".csv")):
            raise MisconfigurationException(f"predictions must end in .jsonl or .csv, got {name!r}")
        self.name = name
        self.examples = examples
        self._rows: dict[int, dict[str, Any]] = {}

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = {}

    @override
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # By place: where there are fewer examples than ranks, some are predicted twice and count once.
        for of_rank in gathered(dict(zip(batch["places"], outputs, strict=True))):
            self._rows |= of_rank

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = run_folder(trainer) / self.name
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for _, row in sorted(self._rows.items())]
        set_aside(path)
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                table = csv.DictWriter(file, fieldnames=list(rows[0]))
                table.writeheader()
                table.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"Predictions for {len(rows)} {self.examples} are in {path}")
