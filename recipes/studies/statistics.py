"""Means with their standard errors."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Estimate(NamedTuple):
    """A mean of some values and its standard error, nan for a single value or if a run has diverged."""

    mean: float
    error: float
    values: int

    @property
    def interval(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t."""
        return float(self.error * stats.t.ppf(0.975, self.values - 1)) if self.values > 1 else math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and standard error.

    Example:
        >>> estimate([1.0, 3.0])
        Estimate(mean=2.0, error=1.0, values=2)
    """
    if not all(map(math.isfinite, values)):
        return Estimate(math.nan, math.nan, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.mean(values), error, len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the same order.

    Example:
        >>> holm([0.25, 0.125])
        [0.25, 0.25]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    ascending = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for place, index in enumerate(ascending):
        # The smallest one is multiplied by their number, the next one by one less; and none is below an earlier one.
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def with_error(found: Estimate, form: str = ".1f") -> str:
    """Show a mean and its standard error in a cell; without the error if there is one value.

    Example:
        >>> with_error(estimate([50.0, 52.0])), with_error(estimate([2.0]), "+.2f")
        ('51.0 ± 1.0', '+2.00')
    """
    error = f" ± {found.error:{form.removeprefix('+')}}" if found.values > 1 else ""
    return f"{found.mean:{form}}{error}"


def with_interval(found: Estimate, digits: int = 2) -> str:
    """Show a difference and its 95 % interval; without the interval if there is one value.

    Example:
        >>> with_interval(estimate([1.0, 2.0, 3.0])), with_interval(estimate([0.5]), digits=1)
        ('+2.00 [-0.48, +4.48]', '+0.5')
    """
    if found.values < 2:
        return f"{found.mean:+.{digits}f}"
    low, high = found.mean - found.interval, found.mean + found.interval
    return f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def mean_cell(values: Sequence[float], digits: int = 1) -> str:
    """Fill a table's cell: mean, standard error and number; without the error if there is one value.

    Example:
        >>> mean_cell([50.0, 52.0]), mean_cell([50.0]), mean_cell([])
        ('51.0 ± 1.0 (2)', '50.0 (1)', '-')
    """
    if not values:
        return "-"
    found = estimate(values)
    return f"{with_error(found, f'.{digits}f')} ({found.values})"
