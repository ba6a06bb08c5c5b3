"""The command line of a demo."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from recipes.shared.files import begin_folder
from recipes.shared.ledger import StoppedError
from recipes.shared.precision import PRECISION_HELP, Precision, precision_of_runs
from recipes.shared.progress import quiet


@dataclass(frozen=True)
class Demo:
    """A program that does its runs and reports; what is finished is kept, and after Ctrl-C the same command resumes.

    Attributes:
        name: of its module; with underscores for dots, of its folder in ``runs``.
        description: for ``--help``.
        written: what it writes beside ``results.jsonl``.
        work: does what is missing and reports. The ``precision`` of its options is that of all runs.
        add_options: adds what this demo has beside ``--folder`` and ``--precision``.
    """

    name: str
    description: str | None
    written: Sequence[str]
    work: Callable[[argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def main(self, arguments: list[str] | None = None) -> int:
        """Run what is not there yet, and report; returns the exit status."""
        options = self.parser().parse_args(arguments)
        quiet()
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
        folder = self.name.replace(".", "_")
        parser = argparse.ArgumentParser(
            prog=f"python -m recipes.{self.name}",
            description=self.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        parser.add_argument("--folder", type=Path, default=Path("runs") / folder, help="output folder")
        parser.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
        self.add_options(parser)
        return parser
