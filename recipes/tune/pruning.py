"""Ending trials early."""

import math
from collections.abc import Sequence
from statistics import median

from optuna import Trial

from recipes.studies.rows import Row


class Watch:
    """Tells a trial its validations, and whether they are hopeless.

    Args:
        trial: the trial in Optuna's study.
        metric: metric of a validation.
        mode: "min" or "max" of the metric.
        others: curves to compare with; without them the trial is never hopeless.

    Attributes:
        curve: the metric after each validation.
    """

    def __init__(self, trial: Trial, metric: str, mode: str, others: Sequence[Sequence[float]]) -> None:
        self.trial = trial
        self.metric = metric
        self.mode = mode
        self.others = others
        self.curve: list[float] = []

    def is_hopeless(self, validations: Sequence[Row]) -> bool:
        """Say whether to end the trial; validations after the one that ends it do not count.

        So the curve does not depend on when this is called.

        Args:
            validations: all validations so far.
        """
        for validation in validations[len(self.curve) :]:
            self.curve.append(validation.get(self.metric, math.nan))
            self.trial.report(self.curve[-1], len(self.curve) - 1)
            if is_worse_than_most(self.curve, self.others, self.mode):
                return True
        return False


def is_worse_than_most(values: Sequence[float], others: Sequence[Sequence[float]], mode: str) -> bool:
    """Return whether a run's best value so far is worse than the others' median after as many validations.

    As Optuna's median pruner does, but not before half of the others' validations, since a low rate begins slowly.

    Args:
        values: values of the run after each validation; one that is not finite is the worst there is.
        others: values of finished runs.
        mode: "min" or "max" of the values.

    Example:
        >>> is_worse_than_most([2.0, 1.9], [[2.0, 1.5], [2.1, 1.8]], "min")
        True
    """
    number = len(values)
    then = [less_is_better(other[number - 1], mode) for other in others if len(other) >= number > 0]
    if not then or number <= max(map(len, others)) // 2:
        return False
    return min(less_is_better(value, mode) for value in values) > median(then)


def less_is_better(value: float, mode: str) -> float:
    """Return a value where less is better; infinity for a run that has diverged."""
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value
