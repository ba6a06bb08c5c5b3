"""Texts that the model wrote in one evaluation: gathered over the ranks, kept in files, and scored."""

import csv
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.language.batches import Batch
from recipes.nlg.metrics import score
from recipes.shared.files import set_aside
from recipes.shared.ranks import gathered, rank


class WrittenTexts:
    """Takes up batches of texts, and gives their scores at the end of an evaluation.

    Args:
        stage: "val" or "test"; the files are called by it.
        metrics: names of the scores.
    """

    def __init__(self, stage: str, metrics: Sequence[str]) -> None:
        self.stage = stage
        self.metrics = metrics
        self._texts: list[tuple[int, str, str, list[str]]] = []  # number, meaning, text, references

    def add(self, batch: Batch, texts: Sequence[str]) -> None:
        """Take up the texts of a batch of meanings."""
        self._texts += zip(batch["number"], batch["meaning"], texts, batch["references"], strict=True)

    def clear(self) -> None:
        """Forget the texts."""
        self._texts = []

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the files and give the scores by name, the same on each rank; every rank calls it.

        Metrics that can't be computed are left out, and named with the reason.
        """
        # With fewer meanings than ranks, some ranks have written for the same one.
        rows = {number: row for number, *row in chain.from_iterable(gathered(self._texts))}
        self.clear()
        if not rows:
            return {}
        meanings, texts, references = zip(*(rows[number] for number in sorted(rows)), strict=True)
        # By one process, since some metrics run another one; and the files first, so that nothing of them is lost.
        scores: dict[str, float] = {}
        if rank() == 0:
            self._write(folder, "texts", "output", zip(meanings, texts, strict=True))
            pairs: list[tuple[str, str]] = []
            for meaning, of_meaning in zip(meanings, references, strict=True):
                pairs += [(meaning, reference) for reference in of_meaning]
            self._write(folder, "references", "reference", pairs)
            scores, missing = score(texts, references, self.metrics)
            for name, reason in missing.items():
                rank_zero_warn(f"{self.stage}_{name} is missing: {reason}")
        return gathered(scores)[0]  # type: ignore[no-any-return]

    def _write(self, folder: Path, name: str, column: str, rows: Iterable[tuple[str, str]]) -> None:
        """Write two columns as e2e-metrics reads them: no line and no column ends within a text."""
        file = folder / f"{self.stage}_{name}.tsv"
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(file)
        table = pd.DataFrame(rows, columns=["mr", column]).map(lambda text: " ".join(text.split()))
        # All in quotes: e2e-metrics strips its lines, and an empty text at the end would take its column with it.
        table.to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
        rank_zero_info(f"The {name} are in {file}")
