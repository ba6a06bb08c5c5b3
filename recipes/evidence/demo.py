"""``make merging-demo``: adapters of four tasks merged into one, trained by LoRA and by EFMLoRA, in minutes.

This is where the study has found its gain over LoRA, and a free competitor that matches it. Rates, rho and
dropout are those that W3's searches have chosen, and the seeds are new.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from recipes.evidence.merging import perform_merging
from recipes.evidence.merging_report import merging_figure, merging_tables
from recipes.evidence.plan import RESULTS, key_of_row
from recipes.evidence.run import Run
from recipes.evidence.verdict import difference
from recipes.evidence.workloads import (
    BASELINE,
    CANDIDATE,
    MORE_DROPOUT,
    MORE_DROPOUT_RANK_2,
    PROBE,
    TITLES,
    WORKLOADS,
    Config,
    Settings,
)
from recipes.shared.ledger import Ledger, Row
from recipes.shared.tables import Table

NAME = "merging_demo"
SETTINGS: Settings = {**WORKLOADS["w3"], "tasks": WORKLOADS["w3"]["tasks"][:4]}
SEEDS = (20, 21, 22)
"""Which neither the search nor the verdict of W3 has used."""

_CHOSEN: dict[str, Config] = {
    BASELINE: {"learning_rate": 5e-4, "dropout": 0.3},
    CANDIDATE: {"learning_rate": 2e-3, "rho": 8.0},
    "rank_2": {"learning_rate": 5e-4, "dropout": 0.3, "rank": 2},
    MORE_DROPOUT: {"learning_rate": 1e-3, "dropout": 0.9},
    MORE_DROPOUT_RANK_2: {"learning_rate": 1e-3, "dropout": 0.9, "rank": 2},
    PROBE: {},
}
"""LoRA, EFMLoRA and the strongest of the study's free competitors."""


def demo_runs(precision: str) -> list[Run]:
    """All runs, the arms of a seed one after the other, so that a demo that is stopped has pairs."""
    settings = {**SETTINGS, "precision": precision}
    runs = []
    for seed in SEEDS:
        for arm, config in _CHOSEN.items():
            runs.append(Run(NAME, settings, arm, config, seed, "test"))
    return runs


class Demo:
    """The runs in a folder, and what they show.

    Args:
        folder: of ``results.jsonl``.
        precision: of all runs.
    """

    def __init__(self, folder: Path, precision: str) -> None:
        self.runs = demo_runs(precision)
        self._ledger = Ledger(folder / RESULTS, key_of_row)
        self._rows: dict[str, list[Row]] = {}

    def work(self) -> None:
        """Do what is not done yet."""
        self._rows = {}
        for row in self._ledger.complete(self.runs, perform_merging):
            self._rows.setdefault(row["arm"], []).append(row)

    def tables(self) -> Sequence[Table]:
        """By way to merge, by task and by number of adapters."""
        return merging_tables(NAME, SETTINGS, self._rows)

    def figure(self) -> Figure | None:
        """Accuracy against the number of merged adapters."""
        return merging_figure(NAME, SETTINGS, self._rows)

    def sentence(self) -> str:
        """What EFMLoRA has gained here, over what, and where the settings come from."""
        candidate = self._accuracies(CANDIDATE)
        found = []
        for arm in (BASELINE, MORE_DROPOUT_RANK_2, PROBE):
            found.append(f"minus {TITLES[arm]} {difference(candidate, self._accuracies(arm))}")
        return (
            f"EFMLoRA after merging by TIES, in points of accuracy, {len(SEEDS)} seeds: {'; '.join(found)}. Rates, "
            "dropout and rho come from the search of W3 in docs/evidence.md, which also says where nothing is gained."
        )

    def _accuracies(self, arm: str) -> dict[int, float]:
        return {row["seed"]: 100 * row["test_accuracy"] for row in self._rows[arm]}
