"""`make demo`: what EFMLoRA's perturbation changes, next to a change of LoRA that costs nothing, in one picture.

Adapters of the uppermost layer of a small sentence encoder are trained on few examples, with LoRA, LoRA with dropout
0.9, and EFMLoRA, at three learning rates and with three seeds. Two processes share the runs. What is finished is kept:
after Ctrl-C the same command resumes.
"""

import argparse
import multiprocessing
import sys
from itertools import product

from recipes.demo.report import plot, sentences, table
from recipes.demo.run import ARMS, RATES, SEEDS, Run, Settings, assist, ledger, perform, share
from recipes.shared.demos import Demo
from recipes.shared.mistakes import without_traceback
from recipes.shared.tables import print_and_write


def work(options: argparse.Namespace) -> None:
    """Do what is missing, and report."""
    # The methods of a seed one after the other: whatever else the machine does slows them alike.
    settings = Settings(precision=options.precision)
    runs = [Run(arm, rate, seed, settings) for seed, rate, arm in product(SEEDS, RATES, ARMS)]
    for _ in range(options.processes - 1):
        # It ends by itself, and with this one.
        multiprocessing.get_context("spawn").Process(target=assist, args=(options.folder, runs), daemon=True).start()
    share(options.folder, runs)
    rows = list(ledger(options.folder).complete(runs, perform))
    print_and_write(table(rows), options.folder / "table.txt")
    plot(rows, options.folder / "demo.png")
    print(sentences(rows))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="that share the runs, one thread each")


main = Demo("demo", __doc__, ["table.txt", "demo.png"], work, _add_options).main

if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
