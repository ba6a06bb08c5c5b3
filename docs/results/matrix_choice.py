"""The arms of column A in protocol_matrix.md, which runs are open given the rows so far, and what the rows choose."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN, DISTURBANCES, PRIMARY  # in this folder
from scipy.stats.qmc import LatinHypercube

from recipes.studies.queue import AnyRun
from recipes.studies.rows import Row

Settings = Mapping[str, Any]

LORA, EFMLORA, FMLORA, RANDOM = "LoRA", "EFMLoRA", "FMLoRA", "RandomPerturbation"
BI_LORA, QAT = "Bi-LoRA", "QAT-LoRA"
STRENGTHS: dict[str, list[float]] = {
    LORA: [],
    EFMLORA: [2, 8, 32, 128],
    FMLORA: [2, 8, 32, 128],
    RANDOM: [0.1, 0.3, 1, 3],
    BI_LORA: [0.05, 0.5, 5, 50],
    QAT: [2, 3, 4],
}
"""Of each arm, in order: rho, sigma, or bits."""
SPACE: dict[str, list[Any]] = {
    "rate": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "head_rate": ["same", 1e-3, 4e-3],
    "rank": [2, 8, 32],
    "dropout": [0.0, 0.1, 0.5, 0.9],
    "averaging": ["none", "0.99", "from step 300"],
}
POINTS = 48
HYPERCUBE = 1  # the first seed that draws 48 different settings
SEARCH_SEEDS = (0, 1, 2)
FINAL_SEEDS = range(100, 120)
BEST = 8  # settings that are kept after the first seed
DISTURBED = [name for name in DISTURBANCES if name != CLEAN]
BOUND = 0.1  # nats of clean validation loss above LoRA's lowest
FURTHER = 4  # the factor by which a grid is extended
TESTED = {BASE_NOISE: (LORA, RANDOM), B_NOISE: (LORA, EFMLORA)}
"""Hypotheses A1 and A2. Their arms also get final runs of each choice that a resampling of the search seeds makes, and
of the choice without a bound; without a bound the others choose by the first seed.
"""


class Run(NamedTuple):
    """One training and its evaluation.

    Attributes:
        arm: a key of :data:`STRENGTHS`.
        settings: a value of each key of :data:`SPACE`.
        strength: the arm's strength; None for LoRA.
        seed: for the examples, the adapter's start, the order of the batches, dropout and noise.
        stage: "search", with all disturbances on validation, or "final", on test.
        disturbances: those that are evaluated.
    """

    arm: str
    settings: Settings
    strength: float | None
    seed: int
    stage: str = "search"
    disturbances: Sequence[str] = tuple(DISTURBANCES)

    @property
    def name(self) -> str:
        """The run's unique name."""
        return json.dumps([self.arm, self.settings, self.strength, self.seed], sort_keys=True)

    def key(self) -> Row:
        """Return the first entries of the run's row."""
        return {**self._asdict(), "disturbances": list(self.disturbances)}

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.stage}: {self.arm} {self.strength or ''} with {values}, seed {self.seed}"


class Setting(NamedTuple):
    """An arm's setting with the results of its search seeds.

    Attributes:
        run: the first seed's run.
        losses: validation losses by disturbance and seed.
    """

    run: Run
    losses: dict[str, dict[int, float]]

    def mean(self, disturbance: str, seeds: Sequence[int]) -> float:
        """Return the mean over seeds, which may repeat."""
        return sum(self.losses[disturbance][seed] for seed in seeds) / len(seeds)

    def has(self, seeds: Iterable[int]) -> bool:
        """Return whether all of these seeds are there."""
        return all(seed in self.losses[CLEAN] for seed in seeds)


def points(space: Mapping[str, Sequence[Any]], number: int, seed: int) -> list[tuple[Settings, float]]:
    """Draw the settings that all arms share, and each arm's place in its grid of strengths, from 0 to 1."""
    drawn = LatinHypercube(len(space) + 1, scramble=False, rng=seed).random(number)
    found = []
    for *places, last in drawn:
        settings = {}
        for (name, values), place in zip(space.items(), places, strict=True):
            settings[name] = values[int(place * len(values))]
        found.append((settings, float(last)))
    return found


def searched() -> list[Run]:
    """Return the runs of all settings on the first seed."""
    return on_first_seed(Run, points(SPACE, POINTS, HYPERCUBE), STRENGTHS)


def on_first_seed(
    kind: Callable[[str, Settings, float | None, int], AnyRun],
    drawn: Iterable[tuple[Settings, float]],
    strengths: Mapping[str, Sequence[float]],
) -> list[AnyRun]:
    """Return each arm's run of each setting.

    Args:
        kind: makes a run of an arm, its settings, its strength and a seed.
        drawn: from :func:`points`.
        strengths: the grid of each arm; an empty one for an arm without a strength.
    """
    runs = []
    for (settings, place), arm in product(drawn, strengths):
        grid = strengths[arm]
        runs.append(kind(arm, settings, grid[int(place * len(grid))] if grid else None, SEARCH_SEEDS[0]))
    return runs


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """Gather the rows of the search by arm and setting."""
    found: dict[str, Setting] = {}
    for row in rows:
        if row["stage"] == "search":
            run = Run(row["arm"], row["settings"], row["strength"], SEARCH_SEEDS[0])
            setting = found.setdefault(run.name, Setting(run, {}))
            for disturbance, measured in row["validation"].items():
                setting.losses.setdefault(disturbance, {})[row["seed"]] = measured["loss"]
    return list(found.values())


# -- the choice


def bound(settings: Iterable[Setting], seeds: Sequence[int]) -> float:
    """Return the highest clean loss that is allowed in a choice, given these seeds."""
    lowest = min(each.mean(CLEAN, seeds) for each in settings if each.run.arm == LORA and each.has(seeds))
    return lowest + BOUND


def ranked(settings: Sequence[Setting], arm: str, disturbance: str, is_bounded: bool = True) -> list[Setting]:
    """Return an arm's settings, sorted by their disturbed loss on the first seed.

    With the bound, those within it come first; the others follow by their clean loss.
    """
    first = SEARCH_SEEDS[:1]
    own = [each for each in settings if each.run.arm == arm and each.has(first)]
    by_loss = sorted(own, key=lambda each: each.mean(disturbance, first))
    if not is_bounded:
        return by_loss
    highest = bound(settings, first)
    within = [each for each in by_loss if each.mean(CLEAN, first) <= highest]
    others = [each for each in by_loss if each.mean(CLEAN, first) > highest]
    return within + sorted(others, key=lambda each: each.mean(CLEAN, first))


def chosen(
    settings: Sequence[Setting], arm: str, disturbance: str, seeds: Sequence[int] = SEARCH_SEEDS
) -> Setting | None:
    """Choose, by the mean over seeds, among the eight settings that are best on the first seed and within the bound.

    Args:
        settings: the settings of all arms.
        arm: the arm to choose for.
        disturbance: the one under which the loss counts.
        seeds: search seeds, which are also used for the clean losses; in a resampling they may repeat.

    Returns:
        None if no setting is within the bound.
    """
    highest = bound(settings, seeds)
    best = ranked(settings, arm, disturbance)[:BEST]
    within = [each for each in best if each.mean(CLEAN, seeds) <= highest]
    return min(within, key=lambda each: each.mean(disturbance, seeds), default=None)


def chosen_freely(settings: Sequence[Setting], arm: str, disturbance: str) -> Setting:
    """Choose without a bound on the clean loss: as above for the hypotheses' arms, otherwise by the first seed."""
    best = ranked(settings, arm, disturbance, is_bounded=False)[:BEST]
    seeds = seeds_without_bound(arm, disturbance)
    return min(best, key=lambda each: each.mean(disturbance, seeds))


def seeds_without_bound(arm: str, disturbance: str) -> tuple[int, ...]:
    """Return the search seeds with which an arm chooses without a bound."""
    return SEARCH_SEEDS if arm in TESTED.get(disturbance, ()) else SEARCH_SEEDS[:1]


# -- the stages


def further(settings: Sequence[Setting], arm: str, disturbance: str) -> list[Run]:
    """Return the runs one value beyond the grid if an arm's best strength under a disturbance is at the grid's end."""
    order = ranked(settings, arm, disturbance)
    tried = [each.run.strength for each in settings if each.run.arm == arm]
    best, at = order[0].run.strength, []
    if best == max(tried):
        # Two more bits make the step smaller by a factor of four.
        at.append(best + 2 if arm == QAT else best * FURTHER)
    if best == min(tried) and arm != QAT:  # there is no grid below 2 bits
        at.append(best / FURTHER)
    runs: dict[str, Run] = {}
    for setting, strength in product(order, at):
        run = setting.run._replace(strength=strength)
        if len(runs) < BEST:
            runs[run.name] = run  # a setting that occurs twice, with different strengths, counts once
    return list(runs.values())


def extended(rows: Iterable[Row]) -> list[Run]:
    """Return the runs that extend the grids, as far as the rows can tell."""

    def more(seen: list[Setting]) -> list[Run]:
        arms, runs = [arm for arm, grid in STRENGTHS.items() if grid], list[Run]()
        for arm, disturbance in product(arms, PRIMARY):
            runs += further(seen, arm, disturbance)
        return runs

    return extended_by(more, {each.run.name: each for each in settings_of(rows)}, searched())


def extended_by(
    more: Callable[[list[Any]], list[AnyRun]], every: Mapping[str, Any], first: Iterable[AnyRun]
) -> list[AnyRun]:
    """Extend again and again, each time by all results so far, so that workers that see other rows do the same.

    Args:
        more: returns the runs of one extension for the settings so far.
        every: all settings that have a result, by their runs' names.
        first: the runs before any extension.
    """
    seen = [every[run.name] for run in first]
    found: dict[str, AnyRun] = {}
    while True:
        new = {run.name: run for run in more(seen)}
        found.update(new)
        if not new or not every.keys() >= new.keys():
            return list(found.values())
        seen += [every[name] for name in new]


def repeated(rows: Iterable[Row]) -> list[Run]:
    """Return the runs of the best eight settings on the other search seeds."""
    settings = settings_of(rows)
    kinds = [(arm, disturbance, True) for arm, disturbance in product(STRENGTHS, DISTURBED)]
    kinds.append((LORA, CLEAN, True))  # needed for the bound
    for disturbance, arms in TESTED.items():
        kinds += [(arm, disturbance, False) for arm in arms]
    runs: dict[str, Run] = {}
    for kind in kinds:
        for setting, seed in product(ranked(settings, *kind)[:BEST], SEARCH_SEEDS[1:]):
            run = setting.run._replace(seed=seed)
            runs[run.name] = run
    return list(runs.values())


def resamplings() -> list[tuple[int, ...]]:
    """Return all ways to draw the search seeds with replacement, which are equally likely."""
    return list(product(SEARCH_SEEDS, repeat=len(SEARCH_SEEDS)))


def final(rows: Iterable[Row]) -> list[Run]:
    """Return the final runs: all choices, each under the disturbance it was made for, and more for the hypotheses."""
    settings = settings_of(rows)
    choices = [(chosen(settings, arm, each), each) for arm, each in product(STRENGTHS, DISTURBED)]
    for disturbance, arms in TESTED.items():
        for arm, seeds in product(arms, resamplings()):
            choices.append((chosen(settings, arm, disturbance, seeds), disturbance))
        choices += [(chosen_freely(settings, arm, disturbance), disturbance) for arm in arms]
    return judged(choices)


def judged(choices: Iterable[tuple[Setting | None, str]]) -> list[Run]:
    """Return the final runs of choices, seed by seed; each setting under the disturbances for which it was chosen."""
    found: dict[str, tuple[Run, set[str]]] = {}
    for setting, disturbance in choices:
        if setting:
            _, under = found.setdefault(setting.run.name, (setting.run, {CLEAN}))
            under.add(disturbance)
    runs = []
    for seed, (run, under) in product(FINAL_SEEDS, found.values()):
        names = [each for each in DISTURBANCES if each in under]
        runs.append(run._replace(seed=seed, stage="final", disturbances=names))
    return runs


STAGES = (lambda rows: searched(), extended, repeated, final)
