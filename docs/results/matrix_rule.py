"""The rule that protocol_matrix.md's results give to users, and their lines on the pages."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matrix_b
from matrix_choice import (  # in this folder
    BI_LORA,
    DISTURBED,
    EFMLORA,
    FMLORA,
    LORA,
    QAT,
    RANDOM,
    SEARCH_SEEDS,
    TESTED,
    Setting,
    chosen,
    chosen_freely,
    settings_of,
)
from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN
from matrix_rates import LOWER
from matrix_table import Comparison, Finals, between, compared, difference, finals_of, on_test
from matrix_unlearning import SHOWN

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, holm, with_interval

TWO_BITS = "base, 2 bits"
FREE = (LORA, LOWER[LORA])
PERTURBATIONS = (EFMLORA, FMLORA, RANDOM, BI_LORA, LOWER[EFMLORA])
TITLES = {
    BASE_NOISE: "noise on the base, as large as its norm",
    "base, 3 bits": "the base rounded to three bits",
    TWO_BITS: "the base rounded to two bits",
    B_NOISE: "noise on B, three times its norm",
}
"""The disturbances of the table, in words; figures.py tells lines apart by them, since it fills in the numbers."""
MILD = [disturbance for disturbance in DISTURBED if disturbance not in TITLES]
"""Those of a sentence."""
SYMBOLS = {RANDOM: "sigma", QAT: "bits"}
"""Of the strength, if it is not rho."""
RELEARNING = "relearning of unlearned facts"
WORTH = 0.02  # nats that a perturbation has to gain, at least; less is chance of the search
WORTH_B = 1 / SHOWN  # the recall of one fact, of as many hidden ones as shown ones


class Verdict(NamedTuple):
    """What helps most against a disturbance, by validation, and how much on test.

    Attributes:
        rival: the best setting without a perturbation.
        best: the best setting with a perturbation; None if none was within the bound.
        found: the difference of their test losses, in nats; None if there is no perturbation.
    """

    rival: Setting
    best: Setting | None
    found: Estimate | None

    @property
    def use(self) -> str:
        """The arm to use: the perturbation's only if it gains enough, and the interval of its difference is below 0."""
        if self.best and self.found and is_worth(self.found, WORTH):
            return self.best.run.arm
        return self.rival.run.arm


def is_worth(found: Estimate, least: float) -> bool:
    """Say whether a difference is a gain of at least so much, and its interval lies below 0."""
    return found.mean + found.interval < 0 and found.mean <= -least


def verdict(settings: Sequence[Setting], finals: Finals, disturbance: str) -> Verdict:
    """Choose a free setting and one with a perturbation on validation, and compare them on test."""
    rival = _lowest(settings, FREE, disturbance)
    if rival is None:
        raise ValueError(f"No free setting is within the bound under {disturbance}.")
    # Rounding in training has to gain as much as a perturbation has to.
    rounded = _lowest(settings, [QAT], disturbance)
    if rounded and is_worth(difference(finals, rounded, rival, disturbance), WORTH):
        rival = rounded
    best = _lowest(settings, PERTURBATIONS, disturbance)
    found = difference(finals, best, rival, disturbance) if best else None
    return Verdict(rival, best, found)


def _lowest(settings: Sequence[Setting], arms: Iterable[str], disturbance: str) -> Setting | None:
    """Return the arms' choice whose mean validation loss under a disturbance is the lowest, if there is one."""
    choices = [chosen(settings, arm, disturbance) for arm in arms]
    within = [each for each in choices if each]
    return min(within, key=lambda each: each.mean(disturbance, SEARCH_SEEDS), default=None)


# -- the pages


def rule(rows: Sequence[Row]) -> list[str]:
    """Return the rule's lines for the page.

    They are a table's rows (what happens, what to use, the free rival and what it loses, the best perturbation and the
    difference of its loss to the rival's, in nats), and a sentence on the mild disturbances.
    """
    settings, finals = settings_of(rows), finals_of(rows)
    lines, costs = [], []
    for disturbance in DISTURBED:
        of = verdict(settings, finals, disturbance)
        disturbed, clean = (estimate(on_test(finals, of.rival, each)).mean for each in (disturbance, CLEAN))
        if disturbance in MILD:
            if of.use in PERTURBATIONS:
                raise ValueError(f"{of.use} is of use under {disturbance}, and the sentence says that none is.")
            costs.append(disturbed - clean)
            continue
        cells = [TITLES[disturbance], of.use, f"{named(of.rival)}: {disturbed - clean:+.2f}", "none within the bound"]
        if of.best and of.found:
            cells[-1] = f"{named(of.best)}: {with_interval(of.found)}"
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"Milder disturbances, and rounding the adapter, cost at most {max(costs):.2f} nats"]


def named(setting: Setting) -> str:
    """Return an arm and its strength."""
    arm, strength = setting.run.arm, setting.run.strength
    return arm if strength is None else f"{arm} ({SYMBOLS.get(arm, 'rho')} {strength:g})"


def rule_of_b(rows: Sequence[Row]) -> str:
    """Return the rule's line on relearning, with shares of the hidden facts that are recalled in place of losses."""
    settings, finals = matrix_b.settings_of(rows), finals_of(rows)
    rival = matrix_b.chosen(settings, LORA)
    if not rival.is_useful(SEARCH_SEEDS):
        raise ValueError("No free setting keeps enough utility.")
    recalled = estimate(matrix_b.recalls(finals, rival)).mean
    choices = [matrix_b.chosen(settings, arm) for arm in matrix_b.TESTED.values()]
    useful = [each for each in choices if each.is_useful(SEARCH_SEEDS)]
    use, cell = LORA, "none with enough utility"
    if useful:
        best = min(useful, key=lambda each: each.recalled(SEARCH_SEEDS))
        found = matrix_b.compared(settings, finals, best.run.arm)
        assert found is not None  # both are useful
        least = min(matrix_b.LEAST_UTILITY, matrix_b.final_utility(finals, rival))
        if is_worth(found.difference, WORTH_B) and matrix_b.final_utility(finals, best) >= least:
            use = best.run.arm
        cell = f"{named(best)}: {with_interval(found.difference)}"
    return f"| {RELEARNING} | {use} | {LORA}: {recalled:.2f} recalled | {cell} |"


def hypotheses(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[str]:
    """Return the rows of the hypotheses; those of column B when its rows decide.

    They have both means, their difference, the interval that covers the search, Holm's p, and in column A the
    difference to the audit's LoRA. Before that its hypotheses have p = 1, and the others thus the highest
    that they can get.
    """
    settings, finals = settings_of(rows_a), finals_of(rows_a)
    is_decided = matrix_b.is_decided(rows_b)
    found: list[tuple[str, Comparison | None, str]] = []
    for name, (disturbance, (_, arm)) in zip(("A1", "A2"), TESTED.items(), strict=True):
        own, audited = (chosen(settings, one, disturbance) for one in (arm, LOWER[LORA]))
        to_audited = with_interval(difference(finals, own, audited, disturbance)) if own and audited else ""
        title = f"{name}: {TITLES[disturbance]}, {arm}"
        found.append((title, compared(settings, finals, arm, disturbance), to_audited))
    for name, arm in matrix_b.TESTED.items():
        each = matrix_b.compared(matrix_b.settings_of(rows_b), finals_of(rows_b), arm) if is_decided else None
        found.append((f"{name}: {RELEARNING}, {arm}", each, ""))
    corrected = holm([each.p if each else 1.0 for _, each, _ in found])
    lines = []
    for (title, each, to_audited), p in zip(found, corrected, strict=True):
        cells = ["", "", "none within the bound", ""]
        if each:
            cells = [f"{mean:.2f}" for mean in each.means]
            cells += [with_interval(each.difference), between(each.covering, 2)]
        lines.append(f"| {title} | {' | '.join(cells)} | {p:.2g} | {to_audited} |")
    return lines if is_decided else lines[: len(TESTED)]


def without_bound(rows: Sequence[Row]) -> list[str]:
    """Return the sentences on what is reached if the clean loss does not count."""
    settings, finals = settings_of(rows), finals_of(rows)
    own, lora = (chosen_freely(settings, arm, BASE_NOISE) for arm in (RANDOM, LORA))
    disturbed, clean = (with_interval(difference(finals, own, lora, each)) for each in (BASE_NOISE, CLEAN))
    first = SEARCH_SEEDS[:1]
    rounded = [chosen_freely(settings, QAT, TWO_BITS), chosen(settings, EFMLORA, TWO_BITS)]
    losses = [each.mean(TWO_BITS, first) for each in rounded if each]
    return [
        f"RandomPerturbation's difference to LoRA is {disturbed}, and {clean} without noise",
        f"on validation data (one seed) QAT-LoRA has {losses[0]:.2f} nats, EFMLoRA {losses[1]:.2f}.",
    ]
