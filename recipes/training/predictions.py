"""A run's folder, and its file of predictions."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.data.files import set_aside
from recipes.training.ranks import gathered


def run_folder(trainer: L.Trainer) -> Path:
    """Return a run's folder. Every rank must call this, so that all agree on it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class PredictionWriter(L.Callback):
    """Write the predictions of all ranks into one file in the run's folder, in the examples' order.

    A batch holds ``indices``, its examples' numbers from 0, and a predict_step returns a mapping for each. The file
    grows with each batch, so that a stopped run loses none of it.

    Args:
        name: the file's; it ends in .jsonl or .csv.
        examples: word for them in the final message, such as "images".
        shows: print each prediction, a mapping with ``prompt`` and ``answer``.

    Raises:
        MisconfigurationException: the name ends otherwise.
    """

    def __init__(self, name: str, examples: str, shows: bool = False) -> None:
        if not name.endswith((".jsonl", ".csv")):
            raise MisconfigurationException(f"predictions must end in .jsonl or .csv, got {name!r}")
        self.name = name
        self.examples = examples
        self.shows = shows
        self._path = Path()
        self._written = 0

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._path = run_folder(trainer) / self.name
        self._written = 0
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            set_aside(self._path)

    @override
    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for of_rank in gathered(dict(zip(batch["indices"], outputs, strict=True))):
            rows |= of_rank
        if not trainer.is_global_zero:
            return
        # The ranks' last batches are filled up with the first examples.
        new = [row for index, row in sorted(rows.items()) if index >= self._written]
        with self._path.open("a", encoding="utf-8", newline="") as file:
            if self._path.suffix == ".csv":
                table = csv.DictWriter(file, fieldnames=list(rows[min(rows)]))
                if not self._written:
                    table.writeheader()
                table.writerows(new)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
        self._written += len(new)
        if self.shows:
            for row in new:
                print(f"> {row['prompt']}\n{row['answer']}\n")

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"Predictions for {self._written} {self.examples} are in {self._path}")
