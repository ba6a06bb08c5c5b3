"""`make merging-demo`: adapters of four tasks merged into one, trained by LoRA, by EFMLoRA and by stronger LoRAs.

Here the study of docs/study.md found a gain over LoRA with the usual dropouts, and changes of LoRA that gain as much.
The rates, rho and dropout are those that its searches chose, and the seeds are new. What is finished is kept: after
Ctrl-C the same command resumes, and a second process started on the folder shares the work.
"""

import argparse
import sys
from itertools import product

from recipes.demo import merging_report as report
from recipes.demo.merging_run import ARMS, SEEDS, Run, Settings, perform
from recipes.demo.training import on_one_thread
from recipes.shared.demos import Demo
from recipes.shared.ledger import Ledger, entries
from recipes.shared.mistakes import without_traceback
from recipes.shared.tables import print_and_write


def work(options: argparse.Namespace) -> None:
    """Do what is missing, and report."""
    on_one_thread()
    # The methods of a seed one after the other, so that a demo that is stopped has pairs.
    runs = [Run(arm, seed, Settings(precision=options.precision)) for seed, arm in product(SEEDS, ARMS)]
    ledger = Ledger(options.folder / "results.jsonl", entries("arm", "config", "seed", "settings"))
    rows = list(ledger.complete(runs, perform))
    print_and_write(report.table(rows), options.folder / "table.txt")
    print(report.sentence(rows))


main = Demo("demo.merging", __doc__, ["table.txt"], work).main

if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
