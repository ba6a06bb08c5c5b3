"""`python -m recipes.clip_fewshot sweep`: data sets x shots x seeds x methods, in one table.

Each run is a process of its own. What is finished is kept, and the same command resumes a run that was stopped from its
last checkpoint. With several values of --rho or --learning_rate, all are run with all seeds, and the table shows those
with the best validation accuracy for each data set, method and number of shots. Options that are not listed here go to
every run, as they would to `fit`, for example `--data.init_args.root=data --model.init_args.pretrained=openai`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot.table import counted, tables
from recipes.shared.configs import config_arguments
from recipes.shared.files import set_aside
from recipes.shared.ledger import Ledger, Row, StoppedError, each_once, entries, keep_options, run_process
from recipes.shared.methods import TITLES
from recipes.studies.process import logging_in, resuming

METHODS = ("lora", "efmlora", "fmlora", "fmlora_manual")


class Run(NamedTuple):
    """One training of the sweep.

    Attributes:
        method: one of METHODS.
        rho: radius of the perturbation; None is the configuration's, or none with LoRA.
        shots: images of each class.
        seed: of everything.
        dataset: None is the configuration's.
        learning_rate: None is the configuration's.
    """

    method: str
    rho: float | None
    shots: int
    seed: int
    dataset: str | None = None
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """What the table calls the method."""
        return TITLES[self.method]

    @property
    def settings(self) -> dict[str, float]:
        """What was given of the values that validation chooses."""
        given = {"rho": self.rho, "learning rate": self.learning_rate}
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        parts = [self.name, *(f"{name} {value:g}" for name, value in self.settings.items())]
        if self.dataset is not None:
            parts.insert(0, self.dataset)
        return ", ".join([*parts, counted(self.shots), f"seed {self.seed}"])

    def key(self) -> Row:
        """The entries of its row that decide it."""
        return self._asdict()

    def folder(self, sweep: Path) -> Path:
        """Where it leaves its files."""
        name = self.method
        for setting, value in self.settings.items():
            name += f"-{setting.replace(' ', '-')}-{value:g}"
        # A data set may be a folder, of whose path one part is left.
        data = sweep if self.dataset is None else sweep / Path(self.dataset).name
        return data / f"{name}-{self.shots}-shot" / f"seed-{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet, and write ``results.jsonl`` and ``table.md``; returns the exit status."""
    options, more = _parser().parse_known_args(arguments)
    fit_options = [f"--config={Path(path).resolve()}" for path in options.config] + more
    _check_names(options.datasets or [])
    keep_options(options.folder, fit_options, written=["table.md"])
    names = ["method", "rho", "learning_rate", "shots", "seed"]
    # Without the option it is the configuration's, whose name is in the row but not in the run.
    ledger = Ledger(options.folder / "results.jsonl", entries(*names, *(["dataset"] if options.datasets else [])))
    rows: list[Row] = []
    try:
        for row in ledger.complete(_runs(options), partial(perform, folder=options.folder, fit_options=fit_options)):
            rows.append(row)
            shown = tables(rows, options.part)
            (options.folder / "table.md").write_text(shown + "\n", encoding="utf-8")
    except StoppedError as stop:
        print(f"This run stopped. The same command resumes it, in {options.folder}")
        return stop.status
    print(shown)
    print(f"Runs, results.jsonl and table.md are in {options.folder}")
    return 0


def _runs(options: argparse.Namespace) -> list[Run]:
    """All that were asked for, with the methods side by side: the load of the machine may change."""
    runs = []
    rates = options.learning_rate or [None]
    for dataset, shots, seed, method in product(
        options.datasets or [None], options.shots, options.seeds, options.methods
    ):
        radii = [None] if method == "lora" else options.rho or [None]
        runs += [Run(method, rho, shots, seed, dataset, rate) for rho, rate in product(radii, rates)]
    return each_once(runs)


def perform(run: Run, folder: Path, fit_options: Sequence[str]) -> Row:
    """The row of a run: what it has written, with method and recipe; it is performed first if it has written nothing.

    Args:
        run: of the sweep.
        folder: of the sweep.
        fit_options: more options of `fit`.
    """
    path = run.folder(folder) / "result.json"
    # A run may have ended although the sweep was stopped before it kept the row.
    if not path.exists():
        run_process(command(run, folder, fit_options))
    checkpoints = path.parent / "checkpoints"
    if not path.exists() and checkpoints.exists():
        # It was stopped in its last test, and Lightning does nothing more with a run whose training is complete.
        set_aside(checkpoints)
        run_process(command(run, folder, fit_options))
    if not path.exists():
        raise SystemExit(
            f"{run} has ended without {path}: leave out options such as fast_dev_run, with which it tests nothing"
        )
    identity = {"recipe": "clip_fewshot", "method": run.method, "name": run.name, "rho": run.rho}
    row = {**identity, "learning_rate": run.learning_rate, **json.loads(path.read_text())}
    if run.dataset is not None and row["dataset"] != run.dataset:
        # Two folders may end alike, and the run's folder has the last part of the path alone.
        raise SystemExit(f"{path} is of the data set {row['dataset']}, not of {run.dataset}: give another --folder")
    return row


def command(run: Run, folder: Path, fit_options: Sequence[str]) -> list[str]:
    """What starts a run, or resumes it.

    Args:
        run: of the sweep.
        folder: of the sweep.
        fit_options: more options of `fit`.
    """
    run_folder = run.folder(folder)
    return [
        *(sys.executable, "-m", "recipes.clip_fewshot", "fit", *configuration(run)),
        *fit_options,
        # After the user's own configurations, of which one may set it too.
        *([] if run.learning_rate is None else [f"--model.init_args.learning_rate={run.learning_rate}"]),
        f"--seed_everything={run.seed}",
        f"--data.init_args.shots={run.shots}",
        f"--data.init_args.seed={run.seed}",
        *([] if run.dataset is None else [f"--data.init_args.dataset={run.dataset}"]),
        *logging_in(run_folder),
        *resuming(run_folder),
    ]


def configuration(run: Run) -> list[str]:
    """Arguments that set the method up, with the run's rho."""
    arguments = config_arguments("clip_fewshot", run.method)
    if run.rho is not None:
        # The method's callback is the last one so far, which is what an option without a number means.
        owner = "model.init_args" if run.method == "fmlora_manual" else "trainer.callbacks.init_args"
        arguments.append(f"--{owner}.rho={run.rho}")
    return arguments


def _check_names(datasets: Sequence[str]) -> None:
    """Refuse data sets whose runs would share a folder."""
    names = [Path(dataset).name for dataset in datasets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MisconfigurationException(f"--datasets has {', '.join(twice)} more than once: the last parts must differ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.clip_fewshot sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["lora", "efmlora", "fmlora"], help="to compare"
    )
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 16], help="images of each class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of shots, adapter and batches")
    parser.add_argument("--datasets", nargs="+", help="names or folders; by default that of the configuration")
    parser.add_argument("--rho", nargs="+", type=float, help="radii to choose from; by default each configuration's")
    parser.add_argument("--learning_rate", nargs="+", type=float, help="rates to choose from, likewise")
    parser.add_argument(
        "--part",
        choices=["test", "validation"],
        default="test",
        help="in the table; validation shows all values, test those that validation has chosen",
    )
    parser.add_argument(
        "--config", nargs="+", default=[], help="YAML files on top of each method's, such as a strategy's"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/clip_fewshot/sweep"), help="where everything lands")
    return parser
