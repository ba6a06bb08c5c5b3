"""`make demo`: what EFMLoRA's perturbation changes, next to a change of LoRA that costs nothing, in one picture.

Adapters of the uppermost layer of a small sentence encoder are trained on few examples, with LoRA, LoRA with dropout
0.9, and EFMLoRA, at three learning rates and with three seeds. Two processes share the runs. What is finished is kept:
after Ctrl-C the same command resumes.
"""

import multiprocessing
import sys
from itertools import product
from pathlib import Path

from jsonargparse import auto_cli

from recipes.command_line.mistakes import without_traceback
from recipes.command_line.precision import SETTING, precision_of_runs
from recipes.command_line.progress import quiet
from recipes.data.files import begin_folder, write_whole
from recipes.demo.report import plot, sentences, table
from recipes.demo.run import ARMS, RATES, SEEDS, DemoRun, assist, share
from recipes.demo.training import Settings
from recipes.studies.ledger import StoppedError

_WRITTEN = ("table.txt", "demo.png")


def main(folder: Path = Path("runs/demo"), processes: int = 2) -> int:
    """Run what is not there yet, and report; returns the exit status.

    Args:
        folder: output folder.
        processes: that share the runs, one thread each.
    """
    quiet()
    begin_folder(folder, "results.jsonl", _WRITTEN)
    precision = precision_of_runs(folder)
    print(f"Precision: {precision}; the environment variable {SETTING} sets another", flush=True)
    try:
        _work(folder, processes, Settings(precision=precision))
    except (KeyboardInterrupt, SystemExit, StoppedError) as stop:  # Lightning turns Ctrl-C into an exit
        print("Stopped. The same command resumes: what is finished is kept")
        return stop.status if isinstance(stop, StoppedError) else 130
    print(f"{', '.join(['results.jsonl', *_WRITTEN])} are in {folder}")
    return 0


def _work(folder: Path, processes: int, settings: Settings) -> None:
    """Do what is missing, and report."""
    # The methods of a seed one after the other: whatever else the machine does slows them alike.
    runs = [DemoRun(arm, rate, seed, settings) for seed, rate, arm in product(SEEDS, RATES, ARMS)]
    for _ in range(processes - 1):
        # It ends by itself, and with this one.
        multiprocessing.get_context("spawn").Process(target=assist, args=(folder, runs), daemon=True).start()
    rows = share(folder, runs)
    shown = table(rows)
    write_whole(folder / "table.txt", shown)
    plot(rows, folder / "demo.png")
    print(f"\n{shown}\n{sentences(rows)}")


if __name__ == "__main__":
    with without_traceback():
        sys.exit(auto_cli(main, prog="python -m recipes.demo", description=__doc__))
