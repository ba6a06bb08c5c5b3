"""`python -m recipes.reproduce TABLE`: one of the paper's tables, with what is published beside it.

Each run is a process of its own, and what is finished is kept: the same command resumes after a stop. Options that are
not listed here go to every run, as they would to the recipe's `fit`, for example `--model.model /models/roberta`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.reproduce.methods import DEFAULT, METHODS
from recipes.reproduce.plan import Plan
from recipes.reproduce.report import plan_text, table_text, time_left
from recipes.reproduce.run import KEY, Place, Run, perform
from recipes.reproduce.tables import TABLES
from recipes.shared.command_line import option
from recipes.shared.ledger import StoppedError, each_once, keep_options
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import precision_of_runs
from recipes.studies.results import Results, Shard, shard

_WAITING = 75
"""The exit status while runs of this share wait for those of other shares: the system's name is EX_TEMPFAIL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; returns the exit status."""
    # What this parser does not know is meant for the recipe, whose own parser refuses what is wrong.
    options, more = _parser().parse_known_args(arguments)
    plan = _plan(options)
    if options.plan:
        print(plan_text(plan))
        return 0
    folder = plan.results.folder
    keep_options(folder, more, written=["table.md"])
    place = Place(folder, precision_of_runs(folder, option(more, "--trainer.accelerator") or "auto"), more)
    try:
        plan.work(partial(perform, place=place), partial(_announce, plan=plan))
    except (KeyboardInterrupt, StoppedError) as stop:
        print(f"Stopped. The same command resumes, in {folder}")
        return stop.status if isinstance(stop, StoppedError) else 130
    print(_write_table(plan))
    print(f"Runs, {plan.results.own.path.name} and table.md are in {folder}")
    if plan.failed:
        names = "\n".join(f"  {run.name}" for run in plan.failed)
        print(f"Failed, with the error above; the same command tries them again:\n{names}")
        return 1
    if plan.waiting or plan.open_runs():
        print(
            f"Not finished: {plan.waiting} runs of this share wait for choices, and {len(plan.open_runs())} are being "
            "done by another process. Start the same command again when the other shares have done their trials"
        )
        return _WAITING
    return 0


def _write_table(plan: Plan) -> str:
    shown = table_text(plan)
    (plan.results.folder / "table.md").write_text(shown, encoding="utf-8")
    return shown


def _announce(run: Run, plan: Plan) -> None:
    _write_table(plan)  # of what is there, for an early look
    counts = f"{len(plan.open_runs())} runs of this share may start, {plan.waiting} wait for choices"
    print(f"\n{run}; {counts}. {time_left(plan)}", flush=True)


def _plan(options: argparse.Namespace) -> Plan:
    table = TABLES[options.table]
    tasks = each_once(options.tasks or table.tasks)
    unknown = [task for task in tasks if task not in table.tasks]
    if unknown:
        raise SystemExit(f"--tasks: {table.name} has no {', '.join(unknown)}; there are {', '.join(table.tasks)}")
    seeds = each_once(options.seeds or table.seeds)
    # A seed that has chosen the settings would favour them in the test.
    used = sorted(set(seeds) & set(table.tuning_seeds))
    if used:
        raise SystemExit(f"--seeds: the seeds {used} choose the settings, so they can't be used for testing")
    results = Results(options.folder or Path("runs/reproduce") / table.name, KEY, options.shard)
    methods = each_once(options.methods or table.methods)
    return Plan(table, methods, tasks, seeds, options.protocol, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.reproduce",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = "; ".join(f"{table.name} ({table.title})" for table in TABLES.values())
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=titles)
    parser.add_argument("--plan", action="store_true", help="print runs, steps and downloads, and start nothing")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"default: those of the table, mostly {' '.join(DEFAULT)}; there are {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all of the table")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: those of the table")
    parser.add_argument(
        "--protocol", choices=("tuned", "paper"), default="tuned",
        help="tuned chooses learning rate and rho on validation data; paper takes the learning rate of the paper's "
        "protocol, and chooses only a rho that the paper does not state",
    )  # fmt: skip
    parser.add_argument("--shard", type=shard, default=Shard(), metavar="2/8", help="do the second of eight shares")
    parser.add_argument("--folder", type=Path, help="where everything lands; default runs/reproduce/TABLE")
    return parser


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
