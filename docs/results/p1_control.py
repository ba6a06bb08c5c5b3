"""P1's control in protocol_p1_p2.md: LoRA with the settings of the winner with EFMLoRA, but rho 0.

From the root of a clone: ``PYTHONPATH=. python docs/results/p1_control.py FOLDER``. Its rows are
``FOLDER/results.jsonl`` when all runs are done. The same command resumes after a stop, and several processes may share
the runs.
"""

import sys
from pathlib import Path

from p2 import OPTIONS, RECIPE  # in this folder
from shared_runs import queue_of, work

from recipes.tune.search import Options, Run, Search
from recipes.tune.space import RHO

CONFIG = {
    "model.learning_rate": "3e-3",
    "model.lora.lora_dropout": "0.1",
    "model.lora.r/model.lora.lora_alpha": "32/64",
    "rho": "0",
}
SEEDS = range(100, 120)


def main(folder: Path) -> None:
    """Train and test all seeds."""
    queue = queue_of(folder, "p1_control", Run, {"options": OPTIONS})
    options = Options(RECIPE, test=True)
    search = Search(options, OPTIONS, {RHO: ["0"]}, queue, folder, "val_loss", "min")
    runs = [Run("without", CONFIG, seed, "final", -1) for seed in SEEDS]
    work(queue, lambda: [run for run in runs if queue.find(run) is None], search.perform, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
