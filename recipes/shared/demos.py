"""The command lines of the demos: one that runs and reports, and one that chooses rho on the validation part."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from recipes.shared.files import begin_folder
from recipes.shared.ledger import StoppedError
from recipes.shared.methods import OURS
from recipes.shared.precision import PRECISION_HELP, Precision, precision_of_runs
from recipes.shared.progress import quiet

Cells = Sequence[str]


@dataclass(frozen=True)
class Demo:
    """A program that does its runs and reports; what is finished is kept, and after Ctrl-C the same command resumes.

    Attributes:
        name: of its package, and of its folder in ``runs``.
        description: for ``--help``.
        written: what it writes beside ``results.jsonl``.
        work: does what is missing and reports. The ``precision`` of its options is that of all runs.
        add_options: adds what this demo has beside ``--folder`` and ``--precision``.
        prepare: looks at the folder before anything is written into it.
        commands: what else it can do, by its first argument; each takes the arguments behind that.
    """

    name: str
    description: str | None
    written: Sequence[str]
    work: Callable[[argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    prepare: Callable[[argparse.Namespace], None] = lambda options: None
    commands: Mapping[str, Callable[[list[str]], None]] = field(default_factory=dict)

    def main(self, arguments: list[str] | None = None) -> int:
        """Run what is not there yet, and report; returns the exit status."""
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] and arguments[0] in self.commands:
            self.commands[arguments[0]](arguments[1:])
            return 0
        options = self.parser().parse_args(arguments)
        quiet()
        self.prepare(options)
        begin_folder(options.folder, "results.jsonl", self.written)
        options.precision = precision_of_runs(options.folder, options.precision)
        print(f"Precision: {options.precision}; --precision sets another", flush=True)
        try:
            self.work(options)
        except (KeyboardInterrupt, SystemExit, StoppedError) as stop:  # Lightning turns Ctrl-C into an exit
            print("Stopped. The same command resumes: what is finished is kept, and long trainings have checkpoints")
            return stop.status if isinstance(stop, StoppedError) else 130
        print(f"{', '.join(['results.jsonl', *self.written])} are in {options.folder}")
        return 0

    def parser(self) -> argparse.ArgumentParser:
        """Of the options."""
        parser = argparse.ArgumentParser(
            prog=f"python -m recipes.{self.name}",
            description=self.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        parser.add_argument("--folder", type=Path, default=Path("runs") / self.name, help="where everything lands")
        parser.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
        self.add_options(parser)
        return parser


def sweep_parser(prog: str, radii: Sequence[float], folder: Path) -> argparse.ArgumentParser:
    """The arguments that every sweep over rho has.

    Args:
        prog: the command.
        radii: to try, unless ``--rho`` names others.
        folder: where the runs land, unless ``--folder`` names another.
    """
    made = argparse.ArgumentParser(prog=prog, description="Validation, by which rho is chosen; the demo shows the test")
    made.add_argument("--rho", type=float, nargs="+", default=list(radii), help="radii to try")
    made.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS), help="LoRA has no radius")
    made.add_argument("--folder", type=Path, default=folder, help=f"where the runs land; default {folder}")
    return made


def print_sweep(
    options: argparse.Namespace, columns: Cells, validated: Callable[[str, float, Precision], Cells]
) -> None:
    """Print what validation says of each method and rho; the table grows with every run.

    Args:
        options: of :func:`sweep_parser`.
        columns: what is measured.
        validated: trains with a method, a rho and a precision unless that has been done, and gives a cell for each
            column.
    """
    quiet()
    precision = precision_of_runs(options.folder)
    table = Table("method", "rho", *columns)
    for method in options.methods:
        # LoRA has no radius: it is trained once, as what the others are compared with.
        for rho in options.rho if method != "LoRA" else [0.0]:
            table.add_row(method, f"{rho:g}", *validated(method, rho, precision))
            Console().print(table)
