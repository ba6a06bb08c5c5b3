"""The tables of column A in protocol_matrix.md."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from matrix_choice import (  # in this folder
    DISTURBED,
    FINAL_SEEDS,
    LORA,
    SEARCH_SEEDS,
    STRENGTHS,
    TESTED,
    Run,
    Setting,
    chosen,
    chosen_freely,
    resamplings,
    seeds_without_bound,
    settings_of,
)
from matrix_disturbances import CLEAN
from scipy import stats

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, with_error, with_interval
from recipes.studies.tables import markdown

DRAWS = 10_000


class Comparison(NamedTuple):
    """The result on a hypothesis.

    Attributes:
        means: of LoRA and of the method; in column A of the test losses, in nats.
        difference: the method's minus LoRA's, paired by seed.
        p: of a paired t-test, before any correction.
        covering: the 95 % interval that covers the search, too; None if its runs are missing.
    """

    means: tuple[float, float]
    difference: Estimate
    p: float
    covering: tuple[float, float] | None


Finals = dict[str, dict[int, Row]]
"""Of a setting's name the final rows by seed."""


def finals_of(rows: Sequence[Row]) -> Finals:
    """Gather the final rows."""
    found: Finals = defaultdict(dict)
    for row in rows:
        if row["stage"] == "final":
            name = Run(row["arm"], row["settings"], row["strength"], SEARCH_SEEDS[0]).name
            found[name][row["seed"]] = row
    return found


def on_test(finals: Finals, setting: Setting, disturbance: str, measure: str = "loss") -> list[float]:
    """Return a setting's test results under a disturbance, by seed."""
    return [finals[setting.run.name][seed]["test"][disturbance][measure] for seed in FINAL_SEEDS]


def difference(finals: Finals, one: Setting, other: Setting, disturbance: str) -> Estimate:
    """Return the mean difference of two settings' test losses, paired by seed."""
    losses = zip(on_test(finals, one, disturbance), on_test(finals, other, disturbance), strict=True)
    return estimate([mine - its for mine, its in losses])


def covering(settings: Sequence[Setting], finals: Finals, arm: str, disturbance: str) -> tuple[float, float]:
    """Return the 95 % interval of the difference to LoRA, which also resamples the search seeds and repeats the choice.

    Each draw takes search seeds with replacement, chooses with them, and compares the two choices on final seeds drawn
    with replacement. If an arm then has no setting within the bound, the choice with all seeds is used.
    """
    differences = []
    for seeds in resamplings():
        losses = []
        for each in (arm, LORA):
            choice = chosen(settings, each, disturbance, seeds) or chosen(settings, each, disturbance)
            losses.append(on_test(finals, choice, disturbance))  # type: ignore[arg-type]
        differences.append(np.subtract(*losses))
    return resampled_interval(differences)


def compared(settings: Sequence[Setting], finals: Finals, arm: str, disturbance: str) -> Comparison | None:
    """Compare a hypothesis' method with LoRA; None if either has no setting within the bound, so that p is 1."""
    own, of_lora = (chosen(settings, each, disturbance) for each in (arm, LORA))
    if own is None or of_lora is None:
        return None
    mine, its = (on_test(finals, each, disturbance) for each in (own, of_lora))
    return Comparison(
        means=(estimate(its).mean, estimate(mine).mean),
        difference=difference(finals, own, of_lora, disturbance),
        p=float(stats.ttest_rel(mine, its).pvalue),
        covering=covering(settings, finals, arm, disturbance),
    )


def resampled_interval(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference.

    Args:
        differences: by final seed, for each resampling of the search seeds.
    """
    values = np.array(differences)
    generator = np.random.default_rng(0)
    which = generator.integers(len(values), size=DRAWS)
    seeds = generator.integers(values.shape[1], size=(DRAWS, values.shape[1]))
    low, high = np.quantile(values[which[:, None], seeds].mean(1), [0.025, 0.975])
    return float(low), float(high)


def between(interval: tuple[float, float] | None, digits: int) -> str:
    """Format an interval in a cell, which is empty if there is none."""
    return f"[{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else ""


def short(setting: Setting) -> str:
    """Format an arm's strength and its other settings."""
    strength = "" if setting.run.strength is None else f"{setting.run.strength:g}; "
    return strength + ", ".join(map(str, setting.run.settings.values()))


def main_table(settings: Sequence[Setting], finals: Finals) -> str:
    """Return the table of each arm's choice within the bound, on test."""
    head = ["disturbance", "arm", "strength; rate, head's, rank, dropout, averaging", "test loss", "minus LoRA's"]
    lines = [[*head, "calibrated", "clean loss", "accuracy, %", "clean accuracy, %"]]
    for disturbance, arm in product(DISTURBED, STRENGTHS):
        choice, of_lora = (chosen(settings, each, disturbance) for each in (arm, LORA))
        if choice is None:
            lines.append([disturbance, arm, "none within the bound", *[""] * 6])
            continue
        is_compared = arm != LORA and of_lora is not None
        lines.append(
            [
                *(disturbance, arm, short(choice), with_error(estimate(on_test(finals, choice, disturbance)), ".3f")),
                with_interval(difference(finals, choice, of_lora, disturbance), 3) if is_compared else "",
                with_error(estimate(on_test(finals, choice, disturbance, "calibrated")), ".3f"),
                with_error(estimate(on_test(finals, choice, CLEAN)), ".3f"),
                with_error(estimate([100 * each for each in on_test(finals, choice, disturbance, "accuracy")])),
                with_error(estimate([100 * each for each in on_test(finals, choice, CLEAN, "accuracy")])),
            ]
        )
    return markdown(lines)


def hypotheses(settings: Sequence[Setting], finals: Finals) -> str:
    """Return the results on A1 and A2: the p-value, and the interval that covers the search."""
    lines = [["disturbance", "arm", "minus LoRA's", "p", "search resampled", "without the bound"]]
    for disturbance, (_, arm) in TESTED.items():
        free = [chosen_freely(settings, each, disturbance) for each in (arm, LORA)]
        unbounded = with_interval(difference(finals, *free, disturbance), 3)
        found = compared(settings, finals, arm, disturbance)
        if found is None:
            lines.append([disturbance, arm, "none within the bound", "1", "", unbounded])
            continue
        interval = with_interval(found.difference, 3)
        lines.append([disturbance, arm, interval, f"{found.p:.2g}", between(found.covering, 3), unbounded])
    return markdown(lines)


def free_table(settings: Sequence[Setting]) -> str:
    """Return the table of each arm's choice without the bound, on validation."""
    head = ["disturbance", "arm", "strength; rate, head's, rank, dropout, averaging", "seeds", "loss", "clean loss"]
    lines = [head]
    for disturbance, arm in product(DISTURBED, STRENGTHS):
        choice, seeds = chosen_freely(settings, arm, disturbance), seeds_without_bound(arm, disturbance)
        losses = [f"{choice.mean(each, seeds):.3f}" for each in (disturbance, CLEAN)]
        lines.append([disturbance, arm, short(choice), str(len(seeds)), *losses])
    return markdown(lines)


def tables(rows: Sequence[Row]) -> str:
    """Return all tables; every run must be there."""
    settings, finals = settings_of(rows), finals_of(rows)
    parts = [
        "Test losses in nats, mean ± standard error over 20 seeds; differences with 95 % intervals, paired by seed\n",
        main_table(settings, finals),
        "\nHypotheses; p before Holm's correction, which takes column B's too\n",
        hypotheses(settings, finals),
        "\nChosen without the bound on the clean loss; validation losses\n",
        free_table(settings),
    ]
    return "\n".join(parts) + "\n"
