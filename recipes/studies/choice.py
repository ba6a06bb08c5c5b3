"""The choice of a setting: the best mean over the seeds."""

import math
from collections.abc import Sequence
from statistics import mean

Judgement = tuple[float, ...]
"""What a run is judged by, of which more is better: the first number counts, and the next ones among equals."""


def best(trials: Sequence[Sequence[Judgement]]) -> int:
    """Return the index of the trial with the best means; of equal ones the first.

    A value that is no number is the worst there is: one run that diverged is enough to avoid its setting.

    Args:
        trials: of each setting, what the runs with its seeds are judged by.

    Example:
        >>> best([[(0.5, -1.0), (0.7, -1.0)], [(0.6, -0.5), (0.6, -0.5)], [(math.nan, 0.0), (0.9, 0.0)]])
        1
    """
    means = [_means(runs) for runs in trials]
    return means.index(max(means))


def _means(runs: Sequence[Judgement]) -> Judgement:
    found = []
    for values in zip(*runs, strict=True):
        found.append(mean(-math.inf if math.isnan(value) else value for value in values))
    return tuple(found)
