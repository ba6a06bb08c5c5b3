"""`python -m recipes.reproduce TABLE`: one of the paper's tables, with what is published.

Each run is its own process, and what is finished is kept: the same command resumes after a stop. Options that are
not listed here go to every run, as they would to the recipe's `fit`, for example `--model.model /models/roberta`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from recipes.command_line.arguments import option
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import known_names, parse_known_options
from recipes.command_line.precision import precision_of_runs
from recipes.reproduce.methods import METHODS
from recipes.reproduce.plan import Plan
from recipes.reproduce.report import plan_text, table_text, time_left
from recipes.reproduce.run import KEY, Context, Run, perform
from recipes.reproduce.table import TABLES, Protocol
from recipes.studies.ledger import Ledger, StoppedError, keep_options


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
        folder: output folder; by default runs/reproduce/TABLE.
    """

    table: str
    plan: bool = False
    methods: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    protocol: Protocol = "tuned"
    folder: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; returns the exit status."""
    # What is not one of these options is meant for the recipe, whose own parser refuses what is wrong.
    options, more = parse_known_options(Options, arguments, "python -m recipes.reproduce", __doc__)
    plan = _plan(options)
    if options.plan:
        print(plan_text(plan))
        return 0
    folder = plan.results.folder
    keep_options(folder, more, written=["table.md"])
    context = Context(folder, precision_of_runs(folder, option(more, "--trainer.accelerator") or "auto"), more)
    try:
        plan.work(partial(perform, context=context), partial(_announce, plan=plan))
    except (KeyboardInterrupt, StoppedError) as stop:
        print(f"Stopped. The same command resumes, in {folder}")
        return stop.status if isinstance(stop, StoppedError) else 130
    print(_write_table(plan))
    print(f"Runs, {plan.results.path.name} and table.md are in {folder}")
    if plan.failed:
        names = "\n".join(f"  {run.name}" for run in plan.failed)
        print(f"Failed, with the error above; the same command tries them again:\n{names}")
        return 1
    return 0


def _write_table(plan: Plan) -> str:
    shown = table_text(plan)
    (plan.results.folder / "table.md").write_text(shown, encoding="utf-8")
    return shown


def _announce(run: Run, plan: Plan) -> None:
    _write_table(plan)  # of what is there, for an early look
    print(f"\n{run}; {len(plan.open_runs())} runs may start. {time_left(plan)}", flush=True)


def _plan(options: Options) -> Plan:
    table = TABLES[known_names("TABLE", [options.table], TABLES)[0]]
    methods = known_names("--methods", options.methods, METHODS) or table.methods
    tasks = known_names("--tasks", options.tasks, table.tasks) or list(table.tasks)
    seeds = list(dict.fromkeys(options.seeds or table.seeds))
    # A seed that has chosen the settings would favour them in the test.
    used = sorted(set(seeds) & set(table.tuning_seeds))
    if used:
        raise SystemExit(f"--seeds: the seeds {used} choose the settings, so they can't be used for testing")
    folder = options.folder or Path("runs/reproduce") / table.name
    return Plan(table, methods, tasks, seeds, options.protocol, Ledger(folder / "results.jsonl", KEY))


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
