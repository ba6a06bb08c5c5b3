"""What the commands of ``python -m recipes.evidence`` do; each takes its options and returns the exit status."""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from time import monotonic

import torch
import transformers
from rich.console import Console

from recipes.evidence import flatness as around
from recipes.evidence import merge_weights as chosen_weights
from recipes.evidence import robustness as conditions
from recipes.evidence.demo import Demo
from recipes.evidence.flatness_report import FlatnessReport
from recipes.evidence.in_turn import perform_in_turn
from recipes.evidence.kept import Judge, kept_runs, ledger_of, work
from recipes.evidence.kept_report import SECONDARY, KeptReport, write_kept
from recipes.evidence.merging import perform_merging
from recipes.evidence.plan import RESULTS, Plan
from recipes.evidence.report import Report, verdict_text, write
from recipes.evidence.robustness_report import RobustnessReport
from recipes.evidence.run import Run, perform
from recipes.evidence.workloads import (
    ARMS,
    WORKLOADS,
    Settings,
    is_in_turn,
    is_merging,
)
from recipes.shared.files import begin_folder
from recipes.shared.ledger import Row
from recipes.shared.precision import precision_of_runs
from recipes.shared.progress import Lines, quiet

_WIDTH = 250
_EVERY = 10.0  # seconds between two lines on how far the runs are


def run(options: argparse.Namespace) -> int:
    """Do what is not done yet, or say how much that is."""
    _prepare()
    plan = _plan(options)
    if options.plan:
        _show_plan(plan)
        return 0
    # Written down now that there are going to be runs.
    precision = precision_of_runs(options.folder, plan.settings["precision"])
    print(f"Precision: {precision}; --precision sets another", flush=True)
    try:
        plan.work(partial(_performer(plan.settings), folder=options.folder), _Progress(plan))
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


def merge_weights(options: argparse.Namespace) -> int:
    """Merge the kept adapters of each run with a weight that is chosen on validation."""
    return _judge_kept(options, chosen_weights.RESULTS, chosen_weights.judge)


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
    """Print the verdict and the tables, and write them with pictures."""
    plan = _plan(options)
    if not plan.ledger.rows:
        raise SystemExit(f"{options.folder / RESULTS} holds no run: start python -m recipes.evidence run")
    shown = Report(plan)
    console = Console(width=max(_WIDTH, Console().width))  # elsewhere than in a terminal it takes 80
    for table in shown.tables():
        table.show(console)
    print(verdict_text(shown))
    written = write(shown, options.folder)
    further: list[KeptReport] = [
        RobustnessReport(shown),
        FlatnessReport(shown),
        chosen_weights.MergeWeightsReport(shown),
    ]
    for of_kept in further:
        if not of_kept.is_empty():
            for table in of_kept.tables():
                table.show(console)
            print(SECONDARY)
            written += write_kept(of_kept, options.folder)
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Merge adapters of LoRA and EFMLoRA, beside free competitors; in minutes."""
    _prepare()
    begin_folder(options.folder, RESULTS, ["merging.md", "merging.png"])
    precision = precision_of_runs(options.folder, options.precision)
    print(f"Precision: {precision}; --precision sets another", flush=True)
    shown = Demo(options.folder, precision)
    try:
        shown.work()
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
        return _stopped()
    console = Console(width=max(_WIDTH, Console().width))
    for table in shown.tables():
        table.show(console)
    text = "\n".join(table.markdown() for table in shown.tables())
    (options.folder / "merging.md").write_text(f"{shown.sentence()}\n\n{text}", encoding="utf-8")
    figure = shown.figure()
    if figure is not None:
        figure.savefig(options.folder / "merging.png", dpi=130)
    print(f"{shown.sentence()}\nmerging.md and merging.png are in {options.folder}")
    return 0


def _performer(settings: Settings) -> Callable[..., Row]:
    if is_merging(settings):
        return perform_merging
    return perform_in_turn if is_in_turn(settings) else perform


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
    print(f"All: about {_time(sum(piece[3] for piece in pieces))} left for one process. A search whose choice is at an")
    print("end of its grid adds trials for all methods, and the rule for an early end may leave runs out.")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _plan(options: argparse.Namespace) -> Plan:
    arms = [arm for arm in ARMS if arm in options.methods]
    settings = _settings(options, options.workload)
    return Plan(options.folder, options.workload, settings, arms, options.stages, options.seeds)


def _settings(options: argparse.Namespace, workload: str) -> Settings:
    # A report or a plan leaves the folder as it is.
    precision = precision_of_runs(options.folder, options.precision, keep=False)
    return {**WORKLOADS[workload], "precision": precision}
