"""`python -m recipes.reproduce TABLE`: one of the paper's tables, next to the published figures.

Each run is its own process, and finished runs are kept: the same command resumes after a stop. Options that are
not listed here are passed to every run's `fit`, for example `--model.model /models/roberta`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from optuna import Study

from recipes.command_line.arguments import config_digests, option
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import known_names, parse_known_options
from recipes.command_line.precision import fast_precision
from recipes.data.files import set_aside, write_whole
from recipes.reproduce.methods import METHODS
from recipes.reproduce.plan import Plan
from recipes.reproduce.report import plan_text, table_text, time_left
from recipes.reproduce.run import Context, Run, restored
from recipes.reproduce.table import TABLES, Protocol
from recipes.studies.process import FailedError, StoppedError
from recipes.studies.queue import Queue, begin_runs, file_storage, open_study, study_so_far


@dataclass
class Options:
    """Options of the command.

    Attributes:
        table: table1 to table6, or table1_offline, which needs no download.
        plan: print runs, steps and downloads, and start nothing.
        methods: any of lora, efmlora, fmlora, lora_sam, flat_lora, nbar, obar; by default the table's.
        tasks: by default all of the table's.
        seeds: by default the table's.
        protocol: tuned chooses learning rate and rho on validation data; paper takes the paper's learning
            rate, and chooses rho only if the paper does not state it.
        folder: output folder, which all workers share; by default runs/reproduce/TABLE.
        storage: URL of an Optuna storage for workers on several machines; by default a file in the folder.
        study: the study's name in the storage; by default the table's.
    """

    table: str
    plan: bool = False
    methods: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    protocol: Protocol = "tuned"
    folder: Path | None = None
    storage: str | None = None
    study: str | None = None

    def __post_init__(self) -> None:
        table = TABLES[known_names("TABLE", [self.table], TABLES)[0]]
        self.methods = known_names("--methods", self.methods, METHODS) or list(table.methods)
        self.tasks = known_names("--tasks", self.tasks, table.tasks) or list(table.tasks)
        self.seeds = list(dict.fromkeys(self.seeds or table.seeds))
        # The seed that chose the settings would favour them in the test.
        if table.tuning_seed in self.seeds:
            raise SystemExit(f"--seeds: seed {table.tuning_seed} chooses the settings, so it can't be used for testing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the missing runs and print the table; return the exit status."""
    # Other options are meant for the recipe, whose own parser checks them.
    options, more = parse_known_options(Options, arguments, "python -m recipes.reproduce", __doc__)
    folder = options.folder or Path("runs/reproduce") / options.table
    study = _study(options, folder, more)
    table = TABLES[options.table]
    plan = Plan(table, options.methods, options.tasks, options.seeds, options.protocol, Queue(study, restored))
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
        print("The first run has failed, with the error above: fix its cause, and start again")
        return failure.status
    print(_write_table(folder, plan))
    print(f"Runs and table.md are in {folder}")
    # Another worker, perhaps with more memory, may have done a failed run since.
    failed = dict.fromkeys(f"  {run.name}" for run in plan.failed if plan.queue.find(run) is None)
    if failed:
        print("Failed, with the error above; the same command tries them again:", *failed, sep="\n")
        return 1
    return 0


def _study(options: Options, folder: Path, more: list[str]) -> Study:
    """Return the study of the table's runs, which begins now unless ``--plan`` only looks at it."""
    name = options.study or options.table
    if options.plan:
        in_folder = file_storage(folder) if (folder / "study.db").exists() else "sqlite://"
        return study_so_far(options.storage or in_folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    if not any((folder / task).exists() for task in TABLES[options.table].tasks):
        set_aside(folder / "table.md")  # somebody else's
    decided = {"precision": fast_precision(option(more, "--trainer.accelerator") or "auto")}
    settings = {"options": more, **config_digests(more)}
    study = open_study(options.storage or file_storage(folder), name, "max", settings, decided)
    begin_runs(folder, {**settings, "precision": study.user_attrs["precision"]})
    return study


def _write_table(folder: Path, plan: Plan) -> str:
    shown = table_text(plan)
    write_whole(folder / "table.md", shown)
    return shown


def _announce(folder: Path, plan: Plan, run: Run) -> None:
    if plan.queue.rows:
        _write_table(folder, plan)  # for an early look
    print(f"\n{run}; {len(plan.open_runs())} runs may start. {time_left(plan)}", flush=True)


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
