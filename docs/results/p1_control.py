"""The control of P1 in protocol_p1_p2.md: LoRA with the settings of the winner with EFMLoRA, and rho 0.

From the root of a clone: ``PYTHONPATH=. python docs/results/p1_control.py FOLDER``. Its rows are
``FOLDER/results.jsonl``. The same command goes on after it was stopped, and several processes may share the runs.
"""

import sys
from pathlib import Path

from p2 import OPTIONS, RECIPE  # beside this file

from recipes.studies.ledger import Ledger
from recipes.tune.search import KEY, Run, Search

CONFIG = {
    "model.learning_rate": "3e-3",
    "model.lora.lora_dropout": "0.1",
    "model.lora.r/model.lora.lora_alpha": "32/64",
    "rho": "0",
}
SEEDS = range(100, 120)


def main(folder: Path) -> None:
    """Train and test all seeds."""
    results = Ledger(folder / "results.jsonl", KEY)
    search = Search(RECIPE, OPTIONS, space={}, radii=[], results=results, metric="val_loss", tests=True)
    runs = [Run("without", CONFIG, seed, "final", -1) for seed in SEEDS]
    while results.perform_first([run for run in runs if results.find(run) is None], search.perform, print):
        results.reload()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
