"""P1's difference with an interval that also covers the seeds of the search's last step.

From the root of a clone: ``PYTHONPATH=. python docs/results/search_seeds.py``. A bootstrap of ``p1.jsonl`` and
``p1_control.jsonl``: each draw takes search seeds with replacement, chooses with them among the four trials of a side
that were kept after the first seed, and compares the two winners on final seeds drawn with replacement. LoRA's winner
is P1's or the control, so every winner has final runs. The first seed's choice is fixed, so the doubt is larger still.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.studies.rows import read
from recipes.tune.search import SEARCH_SEEDS

RESULTS = Path(__file__).parent
SIDES = ("with", "without")
DRAWS = 10_000


class Found(NamedTuple):
    """The results of the draws.

    Attributes:
        mean: the mean difference, with minus without, in nats per token.
        low: the lower end of the 95 % interval.
        high: the upper end.
        other: the share of draws in which LoRA's winner is the control.
    """

    mean: float
    low: float
    high: float
    other: float


def bootstrap() -> Found:
    """Draw, choose and compare."""
    rows = [*read(RESULTS / "p1.jsonl"), *read(RESULTS / "p1_control.jsonl")]
    searched: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    final: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        runs = searched if row["stage"] == "search" else final
        runs[row["side"], json.dumps(row["config"])][row["seed"]] = row["value"]
    repeated, tested = {}, {}
    for arm, losses in searched.items():
        if len(losses) == len(SEARCH_SEEDS):
            repeated[arm] = np.array([losses[seed] for seed in SEARCH_SEEDS])
    for arm, losses in final.items():
        tested[arm] = np.array([losses[seed] for seed in sorted(losses)])
    control = (SIDES[1], json.dumps(read(RESULTS / "p1_control.jsonl")[0]["config"]))
    generator = np.random.default_rng(0)
    differences, others = [], 0
    for _ in range(DRAWS):
        seeds = generator.integers(len(SEARCH_SEEDS), size=len(SEARCH_SEEDS))
        winners = []
        for side in SIDES:
            means = {arm: values[seeds].mean() for arm, values in repeated.items() if arm[0] == side}
            winners.append(min(means, key=lambda arm: means[arm]))
        others += winners[1] == control
        paired = tested[winners[0]] - tested[winners[1]]
        differences.append(paired[generator.integers(len(paired), size=len(paired))].mean())
    low, high = np.quantile(differences, [0.025, 0.975])
    return Found(float(np.mean(differences)), float(low), float(high), others / DRAWS)


if __name__ == "__main__":
    print(bootstrap())
