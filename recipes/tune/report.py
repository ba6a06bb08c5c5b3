"""What a search says: a table, a picture and one sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from recipes.studies.statistics import Estimate, estimate, with_error
from recipes.studies.tables import aligned
from recipes.tune.search import CONTROL, SEARCH_SEEDS, SIDES, WITH, WITHOUT, Search
from recipes.tune.space import RHO, Config, short, size

_NAMES = {WITHOUT: "LoRA", CONTROL: "LoRA with the same other settings"}
_TITLES = {WITHOUT: "without (LoRA)", WITH: "with the perturbation", CONTROL: "control (LoRA)"}
_NOT_LEARNT = "Nothing was learnt: train longer, or try higher rates, in another folder."
_NO_SEEDS = "The seeds change nothing: check that --seed_everything sets the adapter's start and the order of the data."
_OR_COARSE = "Or the metric is too coarse: take a loss, by --metric."


@dataclass(frozen=True)
class Answer:
    """The winners of both sides, and the control if there is one, on seeds that have chosen nothing.

    Attributes:
        configs: of these, by side.
        values: of the metric, by side and seed.
        less_is_better: of the metric.
        trials: the values of all trials.
        tried: how many settings with the perturbation were tried, and how many there are.
    """

    configs: dict[str, Config]
    values: dict[str, dict[int, float]]
    less_is_better: bool
    trials: Sequence[float] = ()
    tried: tuple[int, int] = (1, 1)

    def difference(self, side: str) -> Estimate:
        """Return with the perturbation minus another side, paired by seed."""
        return estimate([self.values[WITH][seed] - value for seed, value in self.values[side].items()])

    def gain(self, side: str) -> tuple[float, float]:
        """Return the 95 % interval of the difference to another side, in which more is better."""
        found = self.difference(side)
        mean = -found.mean if self.less_is_better else found.mean
        return mean - found.interval, mean + found.interval

    def diverged(self, side: str) -> int:
        """Count the runs of a side that have."""
        return sum(not math.isfinite(value) for value in self.values[side].values())

    @property
    def no_answer(self) -> str:
        """Why values that are all equal say nothing; empty if they differ."""
        groups: list[tuple[str, Sequence[float], str]] = [("trials", self.trials, _NOT_LEARNT)]
        for side, found in self.values.items():
            if not self.diverged(side):
                groups.append((f"final runs {_TITLES[side]}", list(found.values()), _NO_SEEDS))
        for what, values, reason in groups:
            # One that diverged has the worst number there is.
            finite = [value for value in values if math.isfinite(value)]
            if len(finite) > 1 and len(set(finite)) == 1:
                return f"No answer: all {len(finite)} {what} gave {finite[0]:.4g}. {reason} {_OR_COARSE}"
        return ""

    @property
    def others(self) -> list[str]:
        """The sides without the perturbation."""
        return [side for side in self.configs if side != WITH]

    @property
    def rival(self) -> str:
        """The one of them that is hardest to beat: one that is better for sure, or else by the low end of the gain."""
        finite = [side for side in self.others if not self.diverged(side)] or self.others
        gains = {side: self.gain(side) for side in finite}
        better = [side for side in gains if gains[side][1] < 0]
        return min(better or gains, key=lambda side: gains[side][0])

    @property
    def winner(self) -> str:
        """The side whose settings to take: with the perturbation if it is better for sure, else the better LoRA."""
        if not self.no_answer and not any(map(self.diverged, self.configs)) and self.gain(self.rival)[0] > 0:
            return WITH
        sign = 1 if self.less_is_better else -1
        return min(self.others, key=lambda side: sign * sum(self.values[side].values()))

    def verdict(self) -> str:
        """Return one sentence: use it, don't, not known yet, or why there is no answer."""
        if self.no_answer:
            return self.no_answer
        low, high = self.gain(self.rival)
        rho = self.configs[WITH][RHO]
        than = f"than {_NAMES[self.rival]}"
        if self.diverged(WITH):
            return f"Don't: it diverged in {self.diverged(WITH)} of its {len(self.values[WITH])} final runs."
        if high < 0:
            tried = f"with the best of the {self.tried[0]} settings tried, of {self.tried[1]}"
            return f"Don't: it is worse {than}, by {-high:.3g} to {-low:.3g} (95 % interval), {tried}."
        for side in self.others:
            if self.diverged(side):
                runs = f"{self.diverged(side)} of its {len(self.values[side])} final runs"
                return f"Not known yet: {_NAMES[side]} diverged in {runs}. Search lower rates, in another folder."
        if low > 0:
            return f"Use it, with rho={rho}: it is better {than}, by {low:.3g} to {high:.3g} (95 % interval)."
        between = f"it is between {abs(low):.3g} worse and {high:.3g} better {than} (95 % interval)"
        return f"Not known yet: {between}. Until then, don't."


def answer(search: Search) -> Answer | None:
    """Return what a finished search has found; None while it is not finished."""
    if not search.is_finished:
        return None
    configs = search.finalists()
    values: dict[str, dict[int, float]] = {}
    for side, config in configs.items():
        rows = search.rows(side, config, "final")
        values[side] = {row["seed"]: row["value"] for row in rows}
    trials = [row["value"] for side in SIDES for row in search.tried(side).values()]
    tried = (search.trials_of(WITH), size(search.space_of(WITH)))
    return Answer(configs, values, rows[0]["mode"] == "min", trials, tried)


def table(search: Search, found: Answer) -> str:
    """Make a line for each side, and one for each difference to the one with the perturbation."""
    lines = [["best", "trials", "in the search", "fresh seeds"]]
    for side, config in found.configs.items():
        trials = searched = ""
        if side != CONTROL:
            trials = str(search.trials_of(side))
            searched = with_error(estimate([row["value"] for row in search.rows(side, config, "search")]), ".4f")
        fresh = estimate(list(found.values[side].values()))
        lines.append([_TITLES[side], trials, searched, with_error(fresh, ".4f")])
    for side in found.configs:
        if side != WITH:
            difference = found.difference(side)
            interval = f"{difference.mean:+.4f}" + ("" if found.no_answer else f" ± {difference.interval:.4f}")
            lines.append([f"with - {side}, 95 % interval", "", "", interval])
    metric = next(iter(search.tried(WITH).values()))["metric"]
    judged_on = "test" if search.tests else "validation"
    notes = [
        *(f"{_TITLES[side]}: {short(config)}" for side, config in found.configs.items()),
        f"{metric}, {'less' if found.less_is_better else 'more'} is better; mean and standard error over seeds "
        f"{', '.join(map(str, SEARCH_SEEDS))} of the search, on validation data, and over {search.fresh} fresh seeds, "
        f"on {judged_on} data; the interval is over seeds, and not over other {judged_on} data",
        "Differences are paired by seed",
    ]
    if CONTROL in found.configs:
        notes.append(
            "The winners differ in more than rho, so the control has the settings of the one with the perturbation and "
            "rho 0: the difference to it is the perturbation's own part. The answer is against the LoRA that is harder "
            "to beat"
        )
    return "\n".join([aligned(lines), "", *notes, ""])


def draw(search: Search) -> Figure:
    """Draw the metric of all trials against the first setting, in a colour for each rho."""
    name = next(iter(search.space), RHO)
    values = search.space.get(name, ["0", *search.radii])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = [*search.tried(WITHOUT).values(), *search.tried(WITH).values()]
    for rho in ["0", *search.radii]:
        of_rho = [row for row in rows if row["config"][RHO] == rho and math.isfinite(row["value"])]
        indices = [values.index(row["config"][name]) for row in of_rho]
        axes.plot(indices, [row["value"] for row in of_rho], "o", label=f"rho {rho}", alpha=0.6)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlabel(name.rpartition(".")[2])
    axes.set_ylabel(f"{rows[0]['metric']} ({rows[0]['mode']} is best)")
    axes.legend()
    return figure
