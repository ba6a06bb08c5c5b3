"""`make merging-demo`: adapters of four tasks merged into one, trained by LoRA, by EFMLoRA and by stronger LoRAs.

This is where the study of docs/evidence.md found a gain over LoRA, and a free competitor that matches it. The rates,
rho and dropout are those that its searches chose, and the seeds are new. What is finished is kept: after Ctrl-C the
same command resumes, and a second process started on the folder shares the work.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import torch
import transformers

from recipes.merging_demo import report
from recipes.merging_demo.run import ARMS, SEEDS, Run, Settings, perform
from recipes.shared.files import begin_folder
from recipes.shared.ledger import Ledger, entries
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import PRECISION_HELP, Precision, precision_of_runs
from recipes.shared.progress import quiet
from recipes.shared.tables import print_and_write


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and report; returns the exit status."""
    options = _parser().parse_args(arguments)
    quiet()
    transformers.utils.logging.set_verbosity_error()  # of the pooler, which the encoder leaves out
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a run repeats bit for bit, and a second process has the next core
    begin_folder(options.folder, "results.jsonl", ["table.txt", "merging.png"])
    precision = precision_of_runs(options.folder, options.precision)
    print(f"Precision: {precision}; --precision sets another", flush=True)
    settings = Settings(precision=precision)
    # The methods of a seed one after the other, so that a demo that is stopped has pairs.
    runs = [Run(arm, seed, settings) for seed, arm in product(SEEDS, ARMS)]
    ledger = Ledger(options.folder / "results.jsonl", entries("arm", "config", "seed", "settings"))
    try:
        rows = list(ledger.complete(runs, perform))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
        print("Stopped. The same command resumes: what is finished is kept")
        return 130
    print_and_write(report.table(rows), options.folder / "table.txt")
    report.figure(rows).savefig(options.folder / "merging.png", dpi=130)
    print(report.sentence(rows))
    print(f"results.jsonl, table.txt and merging.png are in {options.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.merging_demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/merging_demo"), help="where everything lands")
    parser.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
    return parser


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
