"""When a flat minimum pays: the runs of docs/evidence_protocol.md, and what they say.

`run` does the runs and keeps a line of JSON for each, `robustness` judges the kept adapters under further conditions,
`flatness` measures the loss around them, `merge_weights` merges kept adapters with a weight chosen on validation,
`report` shows what is there so far, and `demo` merges a few adapters in minutes. After Ctrl-C the same command resumes;
started twice on one folder, the two processes share the work.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from recipes.evidence import commands
from recipes.evidence.plan import STAGES
from recipes.evidence.workloads import (
    ARMS,
    CHOSEN_OTHERWISE,
    COMPETITORS,
    EXPLORED,
    PROBE,
    SEARCH_SEEDS,
    SEARCHES,
    SEEDS,
    WORKLOADS,
    has_tasks,
    is_merging,
)
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import PRECISION_HELP, Precision


def main(arguments: list[str] | None = None) -> int:
    """Do one of the commands; returns the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="{run,robustness,flatness,merge_weights,report,demo}")
    for name, function, text in (
        ("run", commands.run, "do the runs that are not done yet"),
        ("robustness", commands.robustness, "judge kept adapters: rounded, at other scales, on texts with typos"),
        ("flatness", commands.flatness, "measure the loss around kept adapters: slope, rise, curvature by subspace"),
        ("merge_weights", commands.merge_weights, "merge kept adapters once more, with a weight chosen on validation"),
        ("report", commands.report, "print and write the verdict, the tables and pictures"),
    ):
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(command=function, plan=False)
        workloads = _workloads_of(name)
        command.add_argument("--workload", choices=workloads, default=workloads[0], help=f"{workloads[0]} if left out")
        _add_folder(command)
        command.add_argument(
            "--methods", nargs="+", choices=ARMS, default=list(ARMS), metavar="METHOD",
            help=f"all of them if left out: {', '.join(SEARCHES)}; LoRA with one change: {', '.join(COMPETITORS)}; "
            f"{PROBE}; {', '.join([*EXPLORED, *CHOSEN_OTHERWISE])}",
        )  # fmt: skip
        command.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="both if left out")
        command.add_argument(
            "--seeds", type=_seed, nargs="+", default=list(SEEDS), help="of the runs on test (0 to 19)"
        )
        if name == "run":
            command.add_argument("--plan", action="store_true", help="only say how many runs are left, and how long")
    text = "adapters of four tasks, merged into one: LoRA, EFMLoRA and free competitors, in minutes"
    command = subparsers.add_parser("demo", help=text, description=text)
    command.set_defaults(command=commands.demo)
    _add_folder(command, Path("runs/merging_demo"))
    return parser


def _workloads_of(name: str) -> list[str]:
    """Those that a command is for: the loss around an adapter is measured where there is one adapter with one head."""
    if name == "merge_weights":
        return [one for one in WORKLOADS if is_merging(WORKLOADS[one])]
    return [one for one in WORKLOADS if name != "flatness" or not has_tasks(WORKLOADS[one])]


def _add_folder(command: argparse.ArgumentParser, folder: Path = Path("runs/evidence")) -> None:
    command.add_argument("--folder", type=Path, default=folder, help=f"default {folder}")
    command.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)


def _seed(text: str) -> int:
    if int(text) in SEARCH_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is one of the seeds {SEARCH_SEEDS} that choose configurations")
    return int(text)


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
