"""Texts that the model wrote in one evaluation: gathered over the ranks, kept in files, and scored."""

import csv
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.language.batches import Batch
from recipes.nlg.metrics import score
from recipes.shared.files import set_aside
from recipes.shared.ranks import gathered, rank


class Written(NamedTuple):
    """A text, with the meaning that it says and the texts that people wrote for it."""

    number: int
    meaning: str
    text: str
    references: list[str]


class WrittenTexts:
    """Takes up batches of texts, and gives their scores at the end of an evaluation.

    Args:
        stage: "val" or "test"; the files are called by it.
        metrics: names of the scores.
    """

    def __init__(self, stage: str, metrics: Sequence[str]) -> None:
        self.stage = stage
        self.metrics = metrics
        self._texts: list[Written] = []

    def add(self, batch: Batch, texts: Sequence[str]) -> None:
        """Take up the texts of a batch of meanings."""
        rows = zip(batch["number"], batch["meaning"], texts, batch["references"], strict=True)
        self._texts += [Written(*row) for row in rows]

    def clear(self) -> None:
        """Forget the texts."""
        self._texts = []

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the files and give the scores by name, the same on each rank; every rank calls it.

        Metrics that can't be computed are left out, and named with the reason.
        """
        rows: dict[int, Written] = {}
        # With fewer meanings than ranks, some ranks have written for the same one.
        for row in chain.from_iterable(gathered(self._texts)):
            rows[row.number] = row
        self.clear()
        if not rows:
            return {}
        ordered = [rows[number] for number in sorted(rows)]
        # By one process, since some metrics run another one; and the files first, so that nothing of them is lost.
        scores: dict[str, float] = {}
        if rank() == 0:
            self._write(folder, ordered)
            scores, missing = score([row.text for row in ordered], [row.references for row in ordered], self.metrics)
            for name, reason in missing.items():
                rank_zero_warn(f"{self.stage}_{name} is missing: {reason}")
        return gathered(scores)[0]  # type: ignore[no-any-return]

    def _write(self, folder: Path, rows: Sequence[Written]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        texts, references = (folder / f"{self.stage}_{name}.tsv" for name in ("texts", "references"))
        for file in (texts, references):
            set_aside(file)
        written = [(row.meaning, row.text) for row in rows]
        pairs: list[tuple[str, str]] = []
        for row in rows:
            pairs += [(row.meaning, reference) for reference in row.references]
        for file, column, columns in ((texts, "output", written), (references, "reference", pairs)):
            # Two columns, as e2e-metrics reads them; no line and no column ends within a text. All are in quotes:
            # e2e-metrics strips its lines, and an empty text at the end would take its column with it.
            table = pd.DataFrame(columns, columns=["mr", column]).map(lambda text: " ".join(text.split()))
            table.to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
        rank_zero_info(f"Texts are in {texts}, the references in {references}")
