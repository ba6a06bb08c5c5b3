"""`python -m recipes.clip_fewshot sweep`: data sets x shots x seeds x methods, in one table.

Each run is a process of its own. What is finished is kept, and the same command resumes a run that was stopped from its
last checkpoint; several processes with the same command share the runs. With several values of --rho or
--learning_rate, all are run with all seeds, and the table shows those with the best validation accuracy for each data
set, method and number of shots. Options that are not listed here go to every run, as they would to `fit`, for example
`--data.root DATA --model.pretrained openai`, or `--config` with a strategy's file.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot.plan import Run, Sweep
from recipes.clip_fewshot.table import tables
from recipes.shared.files import set_aside
from recipes.shared.ledger import Row, StoppedError, keep_options, run_process
from recipes.shared.methods import TITLES
from recipes.studies.process import logging_in, resuming, written

_OPTIONS = {"rho": "--rho", "learning_rate": "--model.learning_rate"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet, and write ``results.jsonl`` and ``table.md``; returns the exit status."""
    options, fit_options = _parser().parse_known_args(arguments)
    grids = {"rho": options.rho, "learning_rate": options.learning_rate}
    plan = Sweep(options.datasets, options.shots, options.methods, options.seeds, grids, options.folder)
    keep_options(options.folder, fit_options, written=["table.md"])
    try:
        plan.work(
            partial(perform, folder=options.folder, fit_options=fit_options),
            partial(_announce, plan=plan, options=options),
        )
    except StoppedError as stop:
        print(f"This run stopped. The same command resumes it, in {options.folder}")
        return stop.status
    print(_write_table(plan, options))
    print(f"Runs, results.jsonl and table.md are in {options.folder}")
    left = plan.open_runs()
    if left:
        names = "\n".join(f"  {run.name}" for run in left)
        print(f"Not done, since they failed with the error above or another process does them:\n{names}")
    return 1 if left else 0


def _write_table(plan: Sweep, options: argparse.Namespace) -> str:
    shown = tables(plan, options.part)
    (options.folder / "table.md").write_text(shown + "\n", encoding="utf-8")
    return shown


def _announce(run: Run, plan: Sweep, options: argparse.Namespace) -> None:
    _write_table(plan, options)  # of what is there, for an early look
    print(f"\n{run}", flush=True)


def perform(run: Run, folder: Path, fit_options: Sequence[str]) -> Row:
    """The row of a run: its key, and what it has written; it is performed first if it has written nothing.

    Args:
        run: of the sweep.
        folder: of the sweep.
        fit_options: more options of `fit`.

    Raises:
        MisconfigurationException: what its folder holds is of another data set.
    """
    place = folder / run.name
    result = place / "result.json"
    command = [sys.executable, "-m", "recipes.clip_fewshot", "fit", f"--method={run.method}", *fit_options]
    command += [f"--seed_everything={run.seed}", f"--data.seed={run.seed}", f"--data.shots={run.shots}"]
    command += [f"{_OPTIONS[name]}={value}" for name, value in run.config.items()]
    command += [] if run.dataset is None else [f"--data.dataset={run.dataset}"]
    command += logging_in(place)
    # A run may have ended although the sweep was stopped before it kept the row.
    if not result.exists():
        run_process([*command, *resuming(place)])
    if not result.exists() and resuming(place):
        # It was stopped in its last test, and Lightning does nothing more with a run whose training is complete.
        set_aside(place / "checkpoints")
        run_process(command)
    found = written(result)
    # An earlier command may have had another data set whose folder has this name.
    if run.dataset is not None and found["dataset"] != run.dataset:
        raise MisconfigurationException(
            f"{result} is of the data set {found['dataset']}, not of {run.dataset}: give another --folder"
        )
    return {**run.key(), "recipe": "clip_fewshot", "name": TITLES[run.method], **found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.clip_fewshot sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=TITLES, default=["lora", "efmlora", "fmlora"], help="to compare"
    )
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 16], help="images of each class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of shots, adapter and batches")
    parser.add_argument(
        "--datasets", nargs="+", default=[None], help="names or folders; by default that of the configuration"
    )
    parser.add_argument(
        "--rho", nargs="+", type=float, default=[], help="radii to choose from; by default each configuration's"
    )
    parser.add_argument("--learning_rate", nargs="+", type=float, default=[], help="rates to choose from, likewise")
    parser.add_argument(
        "--part",
        choices=["test", "validation"],
        default="test",
        help="in the table; validation shows all values, test those that validation has chosen",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/clip_fewshot/sweep"), help="output folder")
    return parser
