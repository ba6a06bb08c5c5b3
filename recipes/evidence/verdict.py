"""What the protocol says of a primary hypothesis: gain, no gain, or undecided."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from recipes.evidence.workloads import EARLY_SEEDS
from recipes.shared.statistics import Estimate, estimate

BySeed = Mapping[int, float]
"""Test accuracy in percent."""

MARGIN = 0.5  # points: less is no gain
HYPOTHESES = 3  # primary ones, for Holm's correction
_LEVEL = 0.05
_MOST_SEEDS = 10_000

Kind = Literal["gain", "no gain", "undecided", "no verdict yet"]
"""The protocol's three, and what holds until all runs are there that they need."""


@dataclass(frozen=True)
class Difference:
    """A mean paired difference of two arms.

    Attributes:
        estimate: in percentage points.
        p: of a paired, two-sided t-test that it is 0; None where there is no spread, or only one seed.
    """

    estimate: Estimate
    p: float | None

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.estimate.mean - self.estimate.interval

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.estimate.mean + self.estimate.interval

    def __str__(self) -> str:
        return f"{self.estimate.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Verdict:
    """Of a primary hypothesis.

    Attributes:
        kind: by the protocol's rules.
        reason: which of them, with figures.
        baseline: the candidate's difference to LoRA.
        p_holm: its p value, corrected by Holm's method; while the other hypotheses have none, the most that it can be.
        competitors: the differences to the free competitors.
    """

    kind: Kind
    reason: str
    baseline: Difference
    p_holm: float | None
    competitors: Mapping[str, Difference]


def difference(arm: BySeed, other: BySeed) -> Difference | None:
    """Of the seeds that both arms have; None where there are fewer than two."""
    seeds = sorted(arm.keys() & other.keys())
    if len(seeds) < 2:
        return None
    # Rounded, since equal differences may differ in their last bits.
    differences = [round(arm[seed] - other[seed], 9) for seed in seeds]
    p = None if len(set(differences)) == 1 else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(estimate(differences), p)


def ends_early(baseline: BySeed, candidate: BySeed) -> bool:
    """Whether after the first eight seeds the interval of the candidate minus LoRA lies below half a point."""
    first = range(EARLY_SEEDS)
    if any(seed not in baseline or seed not in candidate for seed in first):
        return False
    found = difference({seed: candidate[seed] for seed in first}, {seed: baseline[seed] for seed in first})
    assert found is not None
    return found.high < MARGIN


def verdict(candidate: BySeed, baseline: BySeed, competitors: Mapping[str, BySeed]) -> Verdict | None:
    """By the protocol's rules, which look at the runs once they are done; None while two pairs of seeds are not there.

    Args:
        candidate: test accuracies of EFMLoRA.
        baseline: of LoRA.
        competitors: of every free competitor; one that lacks a seed of the candidate decides nothing yet.
    """
    base = difference(candidate, baseline)
    if base is None:
        return None
    found: dict[str, Difference] = {}
    for name, accuracies in competitors.items():
        to_competitor = difference(candidate, accuracies)
        if to_competitor is not None and candidate.keys() <= accuracies.keys():
            found[name] = to_competitor
    # Holm multiplies the smallest p by the number of hypotheses, and larger ones by less.
    p_holm = None if base.p is None else min(1.0, HYPOTHESES * base.p)
    kind, reason = _decided(base, p_holm, found, waits=len(found) < len(competitors))
    return Verdict(kind, reason, base, p_holm, found)


def _decided(
    base: Difference, p_holm: float | None, competitors: Mapping[str, Difference], waits: bool
) -> tuple[Kind, str]:
    if base.high < MARGIN:
        return "no gain", f"the upper end of the interval of the difference to LoRA, {base}, is below {MARGIN:g} points"
    # A competitor that costs nothing and does as well leaves no reason to use the method, whatever its gain over LoRA.
    for name, to_competitor in competitors.items():
        if to_competitor.estimate.mean < MARGIN:
            return "no gain", f"{name} matches it: the mean difference to it, {to_competitor}, is below {MARGIN:g}"
        if to_competitor.low <= 0 <= to_competitor.high:
            return "no gain", f"{name} matches it: the interval of the difference to it, {to_competitor}, contains 0"
    if waits:
        return "no verdict yet", "not all free competitors have been run"
    is_significant = p_holm is None or p_holm < _LEVEL
    if base.low > 0 and base.estimate.mean >= MARGIN and is_significant:
        return "gain", f"the difference to LoRA, {base}, and those to all free competitors lie above 0"
    return "undecided", f"the difference to LoRA is {base}; {_needed(base)}"


def _needed(base: Difference) -> str:
    seeds = seeds_to_decide(base.estimate)
    if seeds is None:
        return f"not even {_MOST_SEEDS:,} seeds would decide it"
    return f"about {seeds} seeds with the same mean and spread would decide it"


def seeds_to_decide(found: Estimate) -> int | None:
    """How many seeds, of the same mean and standard deviation, would show a gain or that there is none.

    None if more than ten thousand.

    Example:
        >>> seeds_to_decide(Estimate(mean=1.0, error=0.6, values=9))
        22
    """
    deviation = found.error * math.sqrt(found.values)
    # Counted up, because the quantile of Student's t depends on the number itself.
    for seeds in range(found.values, _MOST_SEEDS + 1):
        error = deviation / math.sqrt(seeds)
        half = error * stats.t.ppf(0.975, seeds - 1)
        if found.mean + half < MARGIN:
            return seeds
        p = 2 * stats.t.sf(abs(found.mean) / error, seeds - 1)
        if found.mean >= MARGIN and HYPOTHESES * p < _LEVEL:
            return seeds
    return None
