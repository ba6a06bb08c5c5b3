"""One short run of a sweep: a process of its own, and the best validation metric that it has logged."""

import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.shared.ledger import Row, StoppedError, run_process


class Run(NamedTuple):
    """A training with one radius.

    Attributes:
        rho: radius of the perturbation.
        seed: of ``--seed_everything``; the data's own seed, of batches and few shots, is the same in all runs.
    """

    rho: float
    seed: int

    def __str__(self) -> str:
        return f"rho {self.rho:g}, seed {self.seed}"

    def key(self) -> Row:
        """The entries of its row that decide it."""
        return self._asdict()


class Sweep(NamedTuple):
    """What all runs share.

    Attributes:
        recipe: name of its folder.
        options: of the recipe's ``fit``.
        rho_option: the option that sets the radius, without dashes.
        folder: where the runs land.
        metric: on validation; None is the one by which the configuration keeps its best checkpoint.
        mode: "min" or "max"; None is the configuration's.
    """

    recipe: str
    options: Sequence[str]
    rho_option: str
    folder: Path
    metric: str | None = None
    mode: str | None = None

    def command(self, run: Run) -> list[str]:
        """What starts a run."""
        logger = "--trainer.logger"
        return [
            *self._fit(),
            f"--{self.rho_option}={run.rho}",
            f"--seed_everything={run.seed}",
            # The folder of the run, in which its metrics and its configuration are found again.
            f"{logger}=lightning.pytorch.loggers.CSVLogger",
            f"{logger}.init_args.save_dir={self.folder}",
            f"{logger}.init_args.name={_name(run)}",
        ]

    def perform(self, run: Run) -> Row:
        """Train, and return the run's row: ``metric``, ``mode``, and its best ``value``, inf or -inf if it diverged.

        Raises:
            StoppedError: the run has failed, or the user has stopped it.
            SystemExit: no metric is known, or the run has not logged it.
        """
        metric, mode = self._judged_by()
        run_process(self.command(run))
        versions = list((self.folder / _name(run)).glob("version_*"))
        if not versions:
            raise SystemExit(f"{run} has written no files: leave out options such as fast_dev_run")
        # A run that was stopped earlier has left a version of its own.
        folder = max(versions, key=lambda path: int(path.name.removeprefix("version_")))
        logged = logged_metrics(folder / "metrics.csv")
        values = logged.get(metric)
        if not values:
            raise SystemExit(
                f"{run} has logged no {metric}, only {', '.join(sorted(logged))}. If it ended before its first "
                "validation, make the epoch shorter with --trainer.limit_train_batches in place of --trainer.max_steps"
            )
        return {**run.key(), "metric": metric, "mode": mode, "value": best(values, mode)}

    def _fit(self) -> list[str]:
        return [sys.executable, "-m", f"recipes.{self.recipe}", "fit", *self.options]

    def _judged_by(self) -> tuple[str, str]:
        monitor, mode = monitored(configuration(tuple(self._fit())))
        metric = self.metric or monitor
        if metric is None:
            raise SystemExit(
                f"{self.recipe} keeps no checkpoint by a metric with these options: name one that it logs on "
                "validation, such as --metric val_loss"
            )
        # The configuration's mode belongs to its own metric.
        if metric != monitor:
            mode = None
        return metric, self.mode or mode or ("min" if "loss" in metric else "max")


def _name(run: Run) -> str:
    return f"rho_{run.rho:g}_seed_{run.seed}"


@cache  # the same for all runs
def configuration(fit: tuple[str, ...]) -> str:
    """The configuration, as YAML, that a recipe's command would run with.

    Args:
        fit: the command.

    Raises:
        StoppedError: the command has failed; it has said why.
    """
    printed = subprocess.run([*fit, "--print_config"], stdout=subprocess.PIPE, text=True, check=False)
    if printed.returncode:
        raise StoppedError(printed.returncode)
    return printed.stdout


def monitored(config: str) -> tuple[str | None, str | None]:
    """The metric by which a configuration keeps the best checkpoint, and its mode; None where there is none."""
    callbacks: list[Any] = yaml.safe_load(config)["trainer"]["callbacks"] or []
    for callback in callbacks:
        arguments = callback.get("init_args", {})
        if arguments.get("monitor") is not None:
            return arguments["monitor"], arguments.get("mode", "min")
    return None, None


def logged_metrics(path: Path) -> dict[str, list[float]]:
    """All values of each metric in a CSVLogger's file, in order."""
    values: dict[str, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                # Each line holds the metrics of one moment, and leaves the others empty.
                if value and name not in ("epoch", "step"):
                    values.setdefault(name, []).append(float(value))
    return values


def best(values: Sequence[float], mode: str) -> float:
    """The best of the values that are finite, or the worst number there is.

    Example:
        >>> best([0.5, 0.25, float("nan")], "min"), best([float("nan")], "max")
        (0.25, -inf)
    """
    finite = [value for value in values if math.isfinite(value)]
    if mode == "min":
        return min(finite, default=math.inf)
    return max(finite, default=-math.inf)
