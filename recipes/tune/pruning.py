"""When a trial ends early."""

import math
from collections.abc import Sequence

from optuna import Trial
from optuna.pruners import MedianPruner
from optuna.study import create_study
from optuna.trial import TrialState, create_trial

from recipes.studies.rows import Row

_BAD = 1e300


class Watch:
    """Tells a trial its validations, and whether they are hopeless.

    Args:
        trial: of Optuna.
        metric: of a validation.
        mode: "min" or "max" of the metric.
        others: the curves with which the trial's is compared; without them it is never hopeless.

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
        """Say whether to end the trial; later validations than the one that ends it do not count.

        So the curve does not depend on when somebody looks.

        Args:
            validations: all so far.
        """
        for validation in validations[len(self.curve) :]:
            self.curve.append(validation.get(self.metric, math.nan))
            self.trial.report(self.curve[-1], len(self.curve) - 1)
            if is_worse_than_most(self.curve, self.others, self.mode):
                return True
        return False


def is_worse_than_most(values: Sequence[float], others: Sequence[Sequence[float]], mode: str) -> bool:
    """Return whether a run's best value so far is worse than the median of others after as many validations.

    By Optuna's median pruner, which says no before half of the others' validations: a low rate begins slowly.

    Args:
        values: of the run, after each validation.
        others: of finished runs.
        mode: "min" or "max" of the values.

    Example:
        >>> is_worse_than_most([2.0, 1.9], [[2.0, 1.5], [2.1, 1.8]], "min")
        True
    """
    others = [other for other in others if other]
    if not values or not others:
        return False
    pruner = MedianPruner(n_startup_trials=1, n_warmup_steps=max(map(len, others)) // 2)
    study = create_study(direction="minimize" if mode == "min" else "maximize")
    for other in others:
        # Only what it was on its way counts.
        study.add_trial(create_trial(value=0.0, intermediate_values=_finite(other, mode)))
    running = create_trial(state=TrialState.RUNNING, intermediate_values=_finite(values, mode))
    return bool(pruner.prune(study, running))


def _finite(values: Sequence[float], mode: str) -> dict[int, float]:
    """Return values by their numbers, with a bad one, of which a median can be taken, for those that diverged."""
    worst = _BAD if mode == "min" else -_BAD
    return {number: value if math.isfinite(value) else worst for number, value in enumerate(values)}
