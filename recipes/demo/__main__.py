"""`make demo`: one picture of what EFMLoRA's perturbation changes, next to a change of LoRA that costs nothing.

Adapters of the uppermost layer of a small sentence encoder are trained on few examples, with LoRA, LoRA with dropout
0.9, and EFMLoRA, at five learning rates and with four seeds. Two processes share the runs. Finished runs are kept:
after Ctrl-C the same command resumes.
"""

import json
import multiprocessing
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from jsonargparse import auto_cli

from recipes.command_line.mistakes import without_traceback
from recipes.command_line.precision import SETTING
from recipes.data.files import begin_folder, write_whole
from recipes.demo.report import plot, tables
from recipes.demo.run import ARMS, RATES, SEEDS, DemoRun, begin, perform
from recipes.demo.training import Settings
from recipes.studies.rows import Row, append, read

_WRITTEN = ("table.txt", "demo.png")


def main(folder: Path = Path("runs/demo"), processes: int = 2) -> int:
    """Do the missing runs, and report; return the exit status.

    Args:
        folder: output folder.
        processes: number of processes that share the runs, one thread each.
    """
    begin_folder(folder, "results.jsonl", _WRITTEN)
    settings = Settings()
    print(f"Precision: {settings.precision}; the environment variable {SETTING} sets another", flush=True)
    # The methods of a seed one after the other: whatever else the machine does slows them alike.
    runs = [DemoRun(arm, rate, seed, settings) for seed, rate, arm in product(SEEDS, RATES, ARMS)]
    try:
        rows = _done(folder / "results.jsonl", runs, processes)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
        print("Stopped. The same command resumes: what is finished is kept")
        return 130
    shown = tables(rows)
    write_whole(folder / "table.txt", shown)
    plot(rows, folder / "demo.png")
    print(f"\n{shown}")
    print(f"{', '.join(['results.jsonl', *_WRITTEN])} are in {folder}")
    return 0


def _done(results: Path, runs: list[DemoRun], processes: int) -> list[Row]:
    """Do the missing runs, and return the rows of all, in order."""
    rows = {}
    for row in read(results):
        rows[_name(row)] = row
    missing = [run for run in runs if _name(run.key()) not in rows]
    with ExitStack() as stack:
        performed: Iterable[Row]
        if processes > 1 and missing:
            start = multiprocessing.get_context("spawn")
            # They end with this process, which handles Ctrl-C.
            performed = stack.enter_context(start.Pool(processes, begin)).imap_unordered(perform, missing)
        else:
            begin()
            performed = map(perform, missing)
        for number, row in enumerate(performed, len(runs) - len(missing) + 1):
            append(results, row)
            rows[_name(row)] = row
            done = f"{row['arm']}, learning rate {row['rate']:g}, seed {row['seed']}"
            print(f"[{number}/{len(runs)}] {done}", flush=True)
    return [rows[_name(run.key())] for run in runs]


def _name(row: Row) -> str:
    return json.dumps([row[name] for name in ("arm", "rate", "seed", "settings")], sort_keys=True)


if __name__ == "__main__":
    with without_traceback():
        sys.exit(auto_cli(main, prog="python -m recipes.demo", description=__doc__))
