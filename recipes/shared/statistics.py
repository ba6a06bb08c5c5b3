"""Means with their errors, and p-values corrected for testing several hypotheses."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from scipy import stats

Key = TypeVar("Key", bound=Hashable)


class Estimate(NamedTuple):
    """A mean of some values and its standard error, nan where there is but one."""

    mean: float
    error: float
    values: int

    @property
    def interval(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t."""
        return float(self.error * stats.t.ppf(0.975, self.values - 1)) if self.values > 1 else math.nan


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's correction for testing several hypotheses (Scandinavian Journal of Statistics 6, 1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        # A hypothesis can't be rejected before one with a smaller p-value.
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        corrected[name] = largest
    return corrected


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error.

    Example:
        >>> estimate([1.0, 3.0])
        Estimate(mean=2.0, error=1.0, values=2)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.mean(values), error, len(values))


def with_error(found: Estimate, form: str = ".1f") -> str:
    """A mean and its standard error in a cell; without the error where there is one value.

    Example:
        >>> with_error(estimate([50.0, 52.0])), with_error(estimate([2.0]), "+.2f")
        ('51.0 ± 1.0', '+2.00')
    """
    error = f" ± {found.error:{form.removeprefix('+')}}" if found.values > 1 else ""
    return f"{found.mean:{form}}{error}"


def with_interval(found: Estimate) -> str:
    """A difference and its 95 % interval; without the interval where there is one value.

    Example:
        >>> with_interval(estimate([1.0, 2.0, 3.0])), with_interval(estimate([0.5]))
        ('+2.00 [-0.48, +4.48]', '+0.50')
    """
    if found.values < 2:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.mean - found.interval:+.2f}, {found.mean + found.interval:+.2f}]"


def mean_cell(values: Sequence[float], digits: int = 1) -> str:
    """A table's cell: mean, standard error and number; the error is missing where there is one value.

    Example:
        >>> mean_cell([50.0, 52.0]), mean_cell([50.0]), mean_cell([])
        ('51.0 ± 1.0 (2)', '50.0 (1)', '-')
    """
    if not values:
        return "-"
    found = estimate(values)
    return f"{with_error(found, f'.{digits}f')} ({found.values})"
