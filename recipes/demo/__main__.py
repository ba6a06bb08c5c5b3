"""`make demo`: LoRA, EFMLoRA and FMLoRA from one seed on the same batches, then one table and one picture.

Each method runs in a process of its own, so that its peak memory is its own. What is finished is kept: after
Ctrl-C the same command resumes from the last checkpoint.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from typing import Any

import docstring_parser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.demo.report import plot, table
from recipes.demo.run import METHODS, Run, Settings, ledger, perform, tokenize
from recipes.shared.demos import Demo
from recipes.shared.files import set_aside, write_whole
from recipes.shared.ledger import Row, run_process
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import precision_of_runs
from recipes.shared.progress import quiet
from recipes.shared.tables import print_and_write


def work(options: argparse.Namespace) -> None:
    """Do what is missing, and report."""
    folder, settings = options.folder, _settings(options)
    rows = ledger(folder)
    runs = [Run(method, settings, folder / method) for method in METHODS]
    if any(rows.find(run) is None for run in runs):
        tokenize(settings, folder)
    results = {row["method"]: row for row in rows.complete(runs, _in_a_process)}
    print_and_write(table(results), folder / "table.txt")
    plot(results, folder, folder / "curves.png")


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


def _only(arguments: list[str]) -> None:
    """What a process of one method does, which is named first."""
    options = DEMO.parser().parse_args(arguments[1:])
    quiet()
    perform(Run(arguments[0], _settings(options), options.folder / arguments[0]))


def _in_a_process(run: Run) -> Row:
    """What a run has written; it is performed first, in a process whose peak memory is its own."""
    path = run.folder / "result.json"
    # A run may have ended although the demo was stopped before it kept the row.
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = [f"--{name}={value}" for name, value in asdict(run.settings).items() if value is not None]
        command = [sys.executable, "-m", "recipes.demo", "only", run.method, "--folder", str(run.folder.parent)]
        run_process([*command, *settings])
    row: Row = json.loads(path.read_text())
    return row


def _drop_other_settings(options: argparse.Namespace) -> None:
    """Set aside what an earlier demo with other settings left: its results would not be comparable.

    Raises:
        MisconfigurationException: that demo is doing a run.
    """
    folder = options.folder
    # Looked up before the folder is set aside, and its choice with it.
    options.precision = precision_of_runs(folder, options.precision, keep=False)
    settings = asdict(_settings(options))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else None
    if before not in (None, settings):
        if ledger(folder).is_in_use():
            raise MisconfigurationException(
                f"{folder} belongs to a demo with other settings, which is doing a run: name another --folder"
            )
        print(f"{folder} holds the results of other settings")
        set_aside(folder)
        folder.mkdir()
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def _add_options(parser: argparse.ArgumentParser) -> None:
    kinds: dict[str, Any] = {"rho": float, "learning_rate": float, "dataset": str, "model": str}
    helps = {parameter.arg_name: parameter.description for parameter in docstring_parser.parse(Settings.__doc__).params}
    for field in fields(Settings):
        if field.name != "precision":
            parser.add_argument(
                f"--{field.name}", type=kinds.get(field.name, int), default=field.default, help=helps[field.name]
            )


DEMO = Demo("demo", __doc__, ["table.txt", "curves.png"], work, _add_options, prepare=_drop_other_settings)


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and report; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["only"]:
        _only(arguments[1:])
        return 0
    return DEMO.main(arguments)


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
