"""A rate beyond P1's grid, after protocol_p1_p2.md: P1's control, LoRA with rank 32, with rate 1e-2.

From the root of a clone: ``PYTHONPATH=. python docs/results/p1_rate.py FOLDER``. Its rows are
``FOLDER/results.jsonl`` when all runs are done. The same command resumes after a stop, and several processes may share
the runs.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from p1_control import CONFIG  # in this folder
from p2 import OPTIONS, RECIPE
from shared_runs import open_runs, queue_of, work

from recipes.studies.rows import Row, read
from recipes.tune.search import SEARCH_SEEDS, WITHOUT, Options, Run, Search, judged
from recipes.tune.space import RHO

HIGHER = {**CONFIG, "model.learning_rate": "1e-2"}
SEEDS = range(100, 110)  # the arms' final seeds


def searched(rows: Sequence[Row]) -> list[Run]:
    """Return the runs on the search's seeds."""
    return [Run(WITHOUT, HIGHER, seed, "search", -1) for seed in SEARCH_SEEDS]


def final(rows: Sequence[Row]) -> list[Run]:
    """Return the runs on the final seeds, if the rate is better than P1's largest one on the search's seeds."""
    published = read(Path(__file__).parent / "p1.jsonl")
    if mean_of_search(rows, HIGHER) >= mean_of_search(published, CONFIG):
        return []
    return [Run(WITHOUT, HIGHER, seed, "final", -1) for seed in SEEDS]


def mean_of_search(rows: Sequence[Row], config: dict[str, str]) -> float:
    """Return a setting's mean over the search's seeds."""
    return statistics.mean(judged(row) for row in rows if row["stage"] == "search" and row["config"] == config)


def main(folder: Path) -> None:
    """Do the runs that are left."""
    queue = queue_of(folder, "p1_rate", Run, {"options": OPTIONS})
    options = Options(RECIPE, test=True)
    search = Search(options, OPTIONS, {RHO: ["0"]}, queue, folder, "val_loss", "min")

    def left() -> list[Run]:
        return open_runs(queue.rows, lambda run: queue.find(run) is not None, [searched, final])

    work(queue, left, search.perform, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
