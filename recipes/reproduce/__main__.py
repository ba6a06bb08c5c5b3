"""`python -m recipes.reproduce TABLE`: one of the paper's tables, with what is published.

Each run is its own process, and what is finished is kept: the same command resumes after a stop. Options that are
not listed here go to every run, as they would to the recipe's `fit`, for example `--model.model /models/roberta`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optuna

from recipes.command_line.arguments import option
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import known_names, parse_known_options
from recipes.command_line.precision import fast_precision
from recipes.data.files import set_aside, write_whole
from recipes.reproduce.methods import METHODS
from recipes.reproduce.plan import Plan
from recipes.reproduce.report import plan_text, table_text, time_left
from recipes.reproduce.run import Context, Run, restored
from recipes.reproduce.table import TABLES, Protocol, Table
from recipes.studies.process import FailedError, StoppedError
from recipes.studies.queue import Queue, file_storage, open_study


@dataclass
class Options:
    """What is run.

    Attributes:
        table: table1 to table6, or table1_offline, which needs no download.
        plan: print runs, steps and downloads, and start nothing.
        methods: of lora, efmlora, fmlora, lora_sam, flat_lora, nbar, obar; by default those of the table.
        tasks: by default all of the table.
        seeds: by default those of the table.
        protocol: tuned chooses learning rate and rho on validation data; paper takes the learning rate of the paper's
            protocol, and chooses only a rho that the paper does not state.
        folder: output folder, which all workers share; by default runs/reproduce/TABLE.
        storage: URL of an Optuna storage for workers on several machines; by default a file in the folder.
    """

    table: str
    plan: bool = False
    methods: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    protocol: Protocol = "tuned"
    folder: Path | None = None
    storage: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; returns the exit status."""
    # What is not one of these options is meant for the recipe, whose own parser refuses what is wrong.
    options, more = parse_known_options(Options, arguments, "python -m recipes.reproduce", __doc__)
    table = TABLES[known_names("TABLE", [options.table], TABLES)[0]]
    folder = options.folder or Path("runs/reproduce") / table.name
    if options.plan and not (folder / "study.db").exists():
        print(plan_text(_plan(options, table, Queue(optuna.create_study(), restored))))
        return 0
    if not any((folder / task).exists() for task in table.tasks):
        set_aside(folder / "table.md")  # of somebody else
    decided = {"precision": fast_precision(option(more, "--trainer.accelerator") or "auto")}
    study = open_study(options.storage or file_storage(folder), table.name, "max", {"options": more}, decided)
    plan = _plan(options, table, Queue(study, restored))
    if options.plan:
        print(plan_text(plan))
        return 0
    context = Context(folder, study.user_attrs["precision"], more)
    try:
        plan.queue.work(plan.open_runs, lambda run, _: plan.attempt(run, context), partial(_announce, folder, plan))
    except (KeyboardInterrupt, StoppedError):
        print(f"Stopped. The same command resumes, in {folder}")
        return 130
    except FailedError as failure:
        return failure.status
    print(_write_table(folder, plan))
    print(f"Runs, study.db and table.md are in {folder}")
    if plan.failed:
        names = "\n".join(f"  {run.name}" for run in plan.failed)
        print(f"Failed, with the error above; the same command tries them again:\n{names}")
        return 1
    return 0


def _write_table(folder: Path, plan: Plan) -> str:
    shown = table_text(plan)
    write_whole(folder / "table.md", shown)
    return shown


def _announce(folder: Path, plan: Plan, run: Run) -> None:
    _write_table(folder, plan)  # of what is there, for an early look
    print(f"\n{run}; {len(plan.open_runs())} runs may start. {time_left(plan)}", flush=True)


def _plan(options: Options, table: Table, queue: Queue[Run]) -> Plan:
    methods = known_names("--methods", options.methods, METHODS) or table.methods
    tasks = known_names("--tasks", options.tasks, table.tasks) or list(table.tasks)
    seeds = list(dict.fromkeys(options.seeds or table.seeds))
    # A seed that has chosen the settings would favour them in the test.
    used = sorted(set(seeds) & set(table.tuning_seeds))
    if used:
        raise SystemExit(f"--seeds: the seeds {used} choose the settings, so they can't be used for testing")
    return Plan(table, methods, tasks, seeds, options.protocol, queue)


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
