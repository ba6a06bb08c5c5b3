"""One short run of a sweep: a process of its own, and the best validation metric that it has logged."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recipes.shared.ledger import Row
from recipes.studies.process import fit


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
        folder: where the runs land.
        metric: on validation; None is the one by which the configuration keeps its best checkpoint.
        mode: "min" or "max"; None is the configuration's.
    """

    recipe: str
    options: Sequence[str]
    folder: Path
    metric: str | None = None
    mode: str | None = None

    def perform(self, run: Run) -> Row:
        """Train, and return the run's row: ``metric``, ``mode``, and its best ``value``, inf or -inf if it diverged.

        Raises:
            StoppedError: the run has failed, or the user has stopped it.
            SystemExit: the run has not logged the metric.
        """
        folder = self.folder / f"rho_{run.rho:g}_seed_{run.seed}"
        fitted = fit(self.recipe, folder, self.arguments(run), needs_monitor=self.metric is None)
        metric = self.metric or fitted["monitor"]
        # The configuration's mode belongs to its own metric.
        mode = self.mode or (fitted["mode"] if metric == fitted["monitor"] else None)
        mode = mode or ("min" if "loss" in metric else "max")
        values = [validation[metric] for validation in fitted["validations"] if metric in validation]
        if not values:
            logged = sorted(set().union(*fitted["validations"]) - {"step"})
            raise SystemExit(
                f"{run} has logged no {metric} on validation, only {', '.join(logged) or 'nothing'}. If it ended "
                "before its first validation, make the epoch shorter with --trainer.limit_train_batches in place of "
                "--trainer.max_steps"
            )
        return {**run.key(), "metric": metric, "mode": mode, "value": best(values, mode)}

    def arguments(self, run: Run) -> list[str]:
        """Of the recipe's ``fit``."""
        return [*self.options, f"--rho={run.rho}", f"--seed_everything={run.seed}"]


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
