"""When a flat minimum pays: the runs of docs/evidence_protocol.md, and what they say.

`run` does the runs and keeps a line of JSON for each, `robustness` judges the kept adapters under further conditions,
`flatness` measures the loss around them, and `report` shows what is there so far. After Ctrl-C the same command
resumes; started twice on one folder, the two processes share the work.
"""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from time import monotonic
from typing import get_args

import torch
import transformers
from rich.console import Console

from recipes.evidence import flatness as around
from recipes.evidence import robustness as conditions
from recipes.evidence.flatness_report import FlatnessReport
from recipes.evidence.kept import Judge, kept_runs, ledger_of, work
from recipes.evidence.kept_report import SECONDARY, KeptReport, write_kept
from recipes.evidence.merging import perform_merging
from recipes.evidence.plan import RESULTS, STAGES, Plan
from recipes.evidence.report import Report, verdict_text, write
from recipes.evidence.robustness_report import RobustnessReport
from recipes.evidence.run import Run, perform
from recipes.evidence.workloads import (
    ARMS,
    COMPETITORS,
    PROBE,
    SEARCH_SEEDS,
    SEARCHES,
    SEEDS,
    WORKLOADS,
    is_merging,
)
from recipes.shared.precision import PRECISION_HELP, Precision, precision_of_runs
from recipes.shared.progress import Lines, quiet

_WIDTH = 250
_OF_KEPT = ("robustness", "flatness")
_EVERY = 10.0  # seconds between two lines on how far the runs are


def main(arguments: list[str] | None = None) -> int:
    """Do one of the commands; returns the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def run(options: argparse.Namespace) -> int:
    """Do what is not done yet, or say how much that is."""
    _prepare()
    plan = _plan(options)
    if options.plan:
        _show_plan(plan)
        return 0
    print(f"Precision: {plan.settings['precision']}; --precision takes another", flush=True)
    try:
        does = perform_merging if is_merging(plan.settings) else perform
        plan.work(partial(does, folder=options.folder), _Progress(plan))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
        return _stopped()
    _show_plan(plan)
    print(f"{options.folder / RESULTS} holds all runs that could be done; now: {_report_command(options)}")
    return 0


def robustness(options: argparse.Namespace) -> int:
    """Judge the kept adapters under further conditions."""
    return _judge_kept(options, conditions.RESULTS, conditions.judge)


def flatness(options: argparse.Namespace) -> int:
    """Measure the loss around the kept adapters."""
    return _judge_kept(options, around.RESULTS, around.judge)


def _judge_kept(options: argparse.Namespace, results: str, judge: Judge) -> int:
    """Judge the kept adapters that are not judged yet."""
    _prepare()
    runs = kept_runs(_plan(options))
    if not runs:
        raise SystemExit(f"{options.folder / RESULTS} names no weights: python -m recipes.evidence run keeps them")
    there = [kept for kept in runs if (options.folder / kept.weights).exists()]
    if len(there) < len(runs):
        print(f"{len(runs) - len(there)} of {len(runs)} rows are left out, since {options.folder} lacks their weights")
    path = options.folder / results
    ledger = ledger_of(path)
    lines = Lines("Kept adapters", len(there), sum(ledger.find(kept) is not None for kept in there))

    def report_done(done: int) -> None:
        lines.done = done - 1  # with those of other processes
        lines.advance()

    try:
        work(there, path, judge, report_done)
    except KeyboardInterrupt:
        return _stopped()
    print(f"{path} holds all of them; now: {_report_command(options)}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Print the verdict and the tables, and write them with a forest plot."""
    plan = _plan(options)
    if not plan.ledger.rows:
        raise SystemExit(f"{options.folder / RESULTS} holds no run: start python -m recipes.evidence run")
    shown = Report(plan)
    console = Console(width=max(_WIDTH, Console().width))  # elsewhere than in a terminal it takes 80
    for table in shown.tables():
        table.show(console)
    print(verdict_text(shown))
    written = write(shown, options.folder)
    further: list[KeptReport] = [RobustnessReport(shown), FlatnessReport(shown)]
    for of_kept in further:
        if not of_kept.is_empty():
            for table in of_kept.tables():
                table.show(console)
            print(SECONDARY)
            written += write_kept(of_kept, options.folder)
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _prepare() -> None:
    quiet()
    # Hundreds of short runs would each print Lightning's notes on devices and loggers.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a run repeats bit for bit, and a second process has the next core


def _stopped() -> int:
    print("Stopped. The same command resumes: what is finished is kept")
    return 130


def _report_command(options: argparse.Namespace) -> str:
    return f"python -m recipes.evidence report --workload {options.workload} --folder {options.folder}"


class _Progress:
    """Lines on how far the runs are, at most one in ten seconds."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._printed = -_EVERY

    def __call__(self, run: Run) -> None:
        if monotonic() - self._printed < _EVERY:
            return
        self._printed = monotonic()
        pieces = self._plan.progress()
        done, total = sum(piece[1] for piece in pieces), sum(piece[2] for piece in pieces)
        left = _time(sum(piece[3] for piece in pieces))
        print(f"{done} of {total} runs done, about {left} left for one process; {run}", flush=True)


def _show_plan(plan: Plan) -> None:
    pieces = plan.progress()
    for title, done, total, seconds in pieces:
        print(f"{title}: {done} of {total} runs done, about {_time(seconds)} left")
    print(
        f"All: about {_time(sum(piece[3] for piece in pieces))} left for one process. A search that ends at the end of"
    )
    print("its grid adds trials for all methods, and the rule for an early end may leave runs out.")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _plan(options: argparse.Namespace) -> Plan:
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {**WORKLOADS[options.workload], "precision": precision_of_runs(options.folder, options.precision)}
    arms = [arm for arm in ARMS if arm in options.methods]
    return Plan(options.folder, options.workload, settings, arms, options.stages, options.seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{run,robustness,flatness,report}")
    for name, function, text in (
        ("run", run, "do the runs that are not done yet"),
        ("robustness", robustness, "judge kept adapters once more: rounded, at other scales, on texts with typos"),
        ("flatness", flatness, "measure the loss around kept adapters: slopes, rises and curvature by subspace"),
        ("report", report, "print and write the verdict, the tables and a forest plot"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function, plan=False)
        # Of a run that merges adapters, there is no single one to judge once more.
        workloads = [one for one in WORKLOADS if name not in _OF_KEPT or not is_merging(WORKLOADS[one])]
        command.add_argument("--workload", choices=workloads, default="w1", help="w1 if left out")
        command.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="default runs/evidence")
        command.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
        command.add_argument(
            "--methods", nargs="+", choices=ARMS, default=list(ARMS), metavar="METHOD",
            help=f"all of them if left out: {', '.join(SEARCHES)}; LoRA with one change: {', '.join(COMPETITORS)}; "
            f"and {PROBE}",
        )  # fmt: skip
        command.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="both if left out")
        command.add_argument(
            "--seeds", type=_seed, nargs="+", default=list(SEEDS), help="of the runs on test (0 to 19)"
        )
        if name == "run":
            command.add_argument("--plan", action="store_true", help="only say how many runs are left, and how long")
    return parser


def _seed(text: str) -> int:
    if int(text) in SEARCH_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is one of the seeds {SEARCH_SEEDS} that choose configurations")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
