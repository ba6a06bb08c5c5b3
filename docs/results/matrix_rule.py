"""The rule that column A of protocol_matrix.md gives to users, and its lines on the pages."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
from matrix_table import Finals, compared, difference, finals_of, on_test

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, holm, with_interval

TWO_BITS = "base, 2 bits"
FREE = (LORA, QAT, LOWER[LORA])
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
WORTH = 0.02  # nats that a perturbation has to gain, at least; less is chance of the search
OTHER_HYPOTHESES = [1.0, 1.0]  # of column B, before it is there: Holm's method then gives the highest p that A can have


class Verdict(NamedTuple):
    """What helps most against a disturbance, by validation, and how much on test.

    Attributes:
        rival: the best setting that costs nothing.
        best: the best setting with a perturbation; None if none was within the bound.
        found: the difference of their test losses, in nats; None if there is no perturbation.
    """

    rival: Setting
    best: Setting | None
    found: Estimate | None

    @property
    def use(self) -> str:
        """The arm to use: the perturbation's only if it gains enough, and the interval of its difference is below 0."""
        if self.best and self.found:
            is_sure = self.found.mean + self.found.interval < 0
            if is_sure and self.found.mean <= -WORTH:
                return self.best.run.arm
        return self.rival.run.arm


def verdict(settings: Sequence[Setting], finals: Finals, disturbance: str) -> Verdict:
    """Choose a free setting and one with a perturbation on validation, and compare them on test."""
    rival = _lowest(settings, FREE, disturbance)
    if rival is None:
        raise ValueError(f"No free setting is within the bound under {disturbance}.")
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


def hypotheses(rows: Sequence[Row]) -> list[str]:
    """Return the rows of A1 and A2.

    They have both losses, their difference, the interval that covers the search, Holm's p, and the difference to the
    audit's LoRA.
    """
    settings, finals = settings_of(rows), finals_of(rows)
    found = [compared(settings, finals, arm, disturbance) for disturbance, (_, arm) in TESTED.items()]
    corrected = holm([*(each.p if each else 1.0 for each in found), *OTHER_HYPOTHESES])
    lines = []
    for name, (disturbance, (_, arm)), each, p in zip(("A1", "A2"), TESTED.items(), found, corrected, strict=False):
        cells, to_audited = ["", "", "none within the bound", ""], ""
        if each:
            low, high = each.covering
            cells = [f"{loss:.2f}" for loss in each.losses]
            cells += [with_interval(each.difference), f"[{low:+.2f}, {high:+.2f}]"]
            own, audited = (chosen(settings, one, disturbance) for one in (arm, LOWER[LORA]))
            if own and audited:
                to_audited = with_interval(difference(finals, own, audited, disturbance))
        lines.append(f"| {name}: {TITLES[disturbance]}, {arm} | {' | '.join(cells)} | {p:.2g} | {to_audited} |")
    return lines


def without_bound(rows: Sequence[Row]) -> list[str]:
    """Return the sentences on what LoRA and QAT-LoRA reach if the clean loss does not count."""
    settings, finals = settings_of(rows), finals_of(rows)
    own, free = chosen(settings, EFMLORA, BASE_NOISE), chosen_freely(settings, LORA, BASE_NOISE)
    if own is None:
        raise ValueError("EFMLoRA has no setting within the bound.")
    to_free = with_interval(difference(finals, own, free, BASE_NOISE))
    clean = [estimate(on_test(finals, each, CLEAN)).mean for each in (own, free)]
    first = SEARCH_SEEDS[:1]
    rounded = [chosen_freely(settings, QAT, TWO_BITS), chosen(settings, EFMLORA, TWO_BITS)]
    losses = [each.mean(TWO_BITS, first) for each in rounded if each]
    return [
        f"EFMLoRA's difference to LoRA is {to_free} under noise on the base, and {clean[0] - clean[1]:+.2f} without",
        f"on validation data (one seed) QAT-LoRA has {losses[0]:.2f} nats, EFMLoRA {losses[1]:.2f}.",
    ]
