"""All methods on the same real tasks: each method tuned alike, then run with several seeds and judged on test examples.

`run` does the runs and keeps a line of JSON for each; `table` and `plot` show what is there so far. After Ctrl-C the
same command resumes; started twice on one folder, the two processes share the runs.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any, get_args

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.comparison.methods import ALL, METHODS, VARIANTS
from recipes.comparison.plan import RESULTS, TUNING_SEEDS, Plan
from recipes.comparison.plot import plot
from recipes.comparison.run import Run, perform
from recipes.comparison.table import tables
from recipes.comparison.tasks import TASKS
from recipes.shared.files import begin_folder
from recipes.shared.ledger import Row, read
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import PRECISION_HELP, Precision, precision_of_runs
from recipes.shared.progress import quiet

_WIDTH = 180
_WAIT = 2.0  # seconds, while other processes do all that can be done now
_WRITTEN = ("table.md", "gain.png", "sharpness.png", "tuning.png", "cost.png")


def main(arguments: list[str] | None = None) -> int:
    """Do one of the commands; returns the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def run(options: argparse.Namespace) -> int:
    """Do what is not done yet."""
    _quiet()
    torch.set_num_threads(1)  # a run repeats bit for bit, and a second process has the next core
    begin_folder(options.folder, RESULTS, _WRITTEN)
    precision = precision_of_runs(options.folder, options.precision)
    print(f"Precision: {precision}; --precision sets another", flush=True)
    tasks = [TASKS[name].computed_in(precision) for name in options.tasks]
    plan = Plan(options.folder, tasks, options.methods, options.seeds)
    shown = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*shown, TextColumn("{task.description}"), speed_estimate_period=600) as progress:
        bar = progress.add_task("", total=None)

        def report(run: Run | None) -> None:
            done, total = plan.done_and_total
            progress.update(bar, completed=done, total=total, description=str(run or ""))
            if run is not None and not progress.console.is_terminal:  # where the bar shows at the end alone
                print(f"{done} of {total} done; {run}", flush=True)

        try:
            report(None)
            plan.work(perform, report)
            while plan.open_runs():  # which other processes are doing
                time.sleep(_WAIT)
                plan.work(perform, report)
            report(None)
        except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
            print("Stopped. The same command resumes: what is finished is kept")
            return 130
    print(
        f"{options.folder / RESULTS} holds all runs; now: python -m recipes.comparison table --folder {options.folder}"
    )
    return 0


def table(options: argparse.Namespace) -> int:
    """Print the tables, and write them as Markdown."""
    task_tables = tables(_rows(options))
    console = Console(width=max(_WIDTH, Console().width))  # elsewhere than in a terminal it takes 80
    for each in task_tables:
        each.show(console)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "table.md").write_text("\n".join(each.markdown() for each in task_tables), encoding="utf-8")
    print(f"Written to {options.folder / 'table.md'}")
    return 0


def pictures(options: argparse.Namespace) -> int:
    """Draw the pictures."""
    rows = _rows(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"Written: {', '.join(map(str, plot(rows, options.folder)))}")
    return 0


def _rows(options: argparse.Namespace) -> list[Row]:
    path = options.file or options.folder / RESULTS
    rows = read(path)
    if not rows:
        raise SystemExit(f"{path} holds no run: start python -m recipes.comparison run, or name a file with --from")
    return rows


def _quiet() -> None:
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.comparison", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{run,table,plot}")
    doing = _command(commands, "run", run, "do the runs that are not done yet")
    doing.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=_of(TASKS))
    doing.add_argument(
        "--methods", nargs="+", choices=ALL, default=list(METHODS), metavar="METHOD",
        help=f"{_of(METHODS)}; only when named: {', '.join(VARIANTS)}",
    )  # fmt: skip
    doing.add_argument("--seeds", type=_seed, nargs="+", default=list(range(5)), help="of the runs on test (0 1 2 3 4)")
    doing.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
    for name, function, text in (("table", table, "print and write the tables"), ("plot", pictures, "draw PNGs")):
        showing = _command(commands, name, function, text)
        showing.add_argument("--from", type=Path, dest="file", metavar="FILE", help="rows to show, not the folder's")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    parser.add_argument("--folder", type=Path, default=Path("runs/comparison"), help="default runs/comparison")
    return parser


def _seed(text: str) -> int:
    if int(text) in TUNING_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is one of the seeds {TUNING_SEEDS} that choose configurations")
    return int(text)


def _of(names: Any) -> str:
    return f"all of them if left out: {', '.join(names)}"


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
