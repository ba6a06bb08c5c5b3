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
    settings_of,
)
from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN
from matrix_rates import LOWER
from matrix_table import Finals, compared, difference, finals_of, on_test

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, holm, with_interval

FREE = (LORA, QAT, LOWER[LORA])
PERTURBATIONS = (EFMLORA, FMLORA, RANDOM, BI_LORA, LOWER[EFMLORA])
TITLES = {
    "base, noise 0.3": "noise on the base, a third of its norm",
    BASE_NOISE: "noise on the base, as large as its norm",
    "base, 4 bits": "the base rounded to four bits",
    "base, 3 bits": "the base rounded to three bits",
    "base, 2 bits": "the base rounded to two bits",
    "B, noise 1": "noise on B, as large as its norm",
    B_NOISE: "noise on B, three times its norm",
    "A and B, 4 bits": "the adapter rounded to four bits",
    "A and B, 3 bits": "the adapter rounded to three bits",
    "A and B, 2 bits": "the adapter rounded to two bits",
}
"""Each disturbance in words; figures.py tells lines apart by them, since it fills in the numbers."""
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
    """Return the rows of the rule's table: what happens, what to use, the free rival and the best perturbation.

    What the free rival loses by a disturbance, and the difference of the perturbation's loss to its, are in nats.
    """
    settings, finals = settings_of(rows), finals_of(rows)
    lines = []
    for disturbance in DISTURBED:
        of = verdict(settings, finals, disturbance)
        disturbed, clean = (estimate(on_test(finals, of.rival, each)).mean for each in (disturbance, CLEAN))
        cells = [TITLES[disturbance], of.use, f"{named(of.rival)}: {disturbed - clean:+.2f}", "none within the bound"]
        if of.best and of.found:
            cells[-1] = f"{named(of.best)}: {with_interval(of.found)}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
