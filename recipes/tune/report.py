"""What a search says: a table, a picture and one sentence."""

import math
from dataclasses import dataclass

from matplotlib.figure import Figure
from scipy import stats

from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate, estimate, with_error
from recipes.shared.tables import Table
from recipes.tune.search import SEARCH_SEEDS, SIDES, WITH, WITHOUT, Search
from recipes.tune.space import RHO, Config, short

_TITLES = {WITHOUT: "without (LoRA)", WITH: "with the perturbation"}


@dataclass(frozen=True)
class Answer:
    """The winners of both sides on seeds that have chosen nothing.

    Attributes:
        configs: of the winners, by side.
        values: of the metric, by side and seed.
        less_is_better: of the metric.
        seconds: of a run.
    """

    configs: dict[str, Config]
    values: dict[str, dict[int, float]]
    less_is_better: bool
    seconds: float

    @property
    def difference(self) -> Estimate:
        """With the perturbation minus without it, paired by seed."""
        return estimate([self.values[WITH][seed] - value for seed, value in self.values[WITHOUT].items()])

    @property
    def gain(self) -> tuple[float, float]:
        """The 95 % interval of the difference, in which more is better."""
        found = self.difference
        mean = -found.mean if self.less_is_better else found.mean
        return mean - found.interval, mean + found.interval

    @property
    def winner(self) -> str:
        """The side whose settings to take: with the perturbation only if it is better for sure."""
        return WITH if self.gain[0] > 0 else WITHOUT

    def verdict(self) -> str:
        """One sentence: use it, don't, or not known yet."""
        low, high = self.gain
        rho = self.configs[WITH][RHO]
        if math.isnan(low):
            return "Not known yet: runs have diverged, or there is one seed. Lower the learning rates, or add seeds."
        if low > 0:
            return f"Use it, with rho={rho}: it is better by {low:.3g} to {high:.3g} (95 % interval)."
        if high < 0:
            return f"Don't: without it the result is better by {-high:.3g} to {-low:.3g} (95 % interval)."
        return f"Not known yet: between {abs(low):.3g} worse and {high:.3g} better (95 % interval). Until then, don't."

    def one_more_hour(self) -> str:
        """What it would buy, if the spread of the seeds stays."""
        found = self.difference
        more = int(3600 / (2 * self.seconds))
        values = found.values + more
        if more == 0 or not math.isfinite(found.error):
            return f"A seed of both sides takes {2 * self.seconds / 3600:.1f} hours."
        deviation = found.error * math.sqrt(found.values)
        width = deviation / math.sqrt(values) * stats.t.ppf(0.975, values - 1)
        return (
            f"One more hour buys {more} more seeds of both sides (--fresh {values}), and an interval of about "
            f"± {width:.3g} in place of ± {found.interval:.3g}. Decide once: looking again and again finds differences."
        )


def answer(search: Search) -> Answer | None:
    """What a finished search has found; None while it is not finished."""
    if not search.is_finished:
        return None
    configs: dict[str, Config] = {}
    finals: dict[str, list[Row]] = {}
    for side in SIDES:
        config = search.chosen(side)
        assert config is not None  # of a finished search
        configs[side], finals[side] = config, search.rows(side, config, "final")
    values = {}
    for side, rows in finals.items():
        values[side] = {row["seed"]: row["value"] for row in rows}
    every = [*finals[WITHOUT], *finals[WITH]]
    seconds = sum(row["seconds"] for row in every) / len(every)
    return Answer(configs, values, every[0]["mode"] == "min", seconds)


def table(search: Search, found: Answer) -> Table:
    """A line for the winner of each side, and one for their difference."""
    lines = []
    for side in SIDES:
        config = found.configs[side]
        searched = estimate([row["value"] for row in search.rows(side, config, "search")])
        fresh = estimate(list(found.values[side].values()))
        trials = str(search.trials_of_side())
        lines.append([_TITLES[side], trials, with_error(searched, ".4f"), with_error(fresh, ".4f")])
    difference = found.difference
    interval = f"{difference.mean:+.4f} ± {difference.interval:.4f}"
    lines.append(["difference, 95 % interval", "", "", interval])
    metric = next(iter(search.tried(WITH).values()))["metric"]
    judged_on = "test" if search.tests else "validation"
    notes = [
        *(f"{_TITLES[side]}: {short(config)}" for side, config in found.configs.items()),
        f"{metric}, {'less' if found.less_is_better else 'more'} is better; mean and standard error over seeds "
        f"{', '.join(map(str, SEARCH_SEEDS))} of the search, on validation data, and over {search.fresh} fresh seeds, "
        f"on {judged_on} data; the interval is over seeds, and not over other data",
        f"Best of equally many trials; the difference is paired by seed. {found.one_more_hour()}",
    ]
    others = {**found.configs[WITH], RHO: found.configs[WITHOUT][RHO]}
    if others != found.configs[WITHOUT]:
        notes.append(
            "The difference is not the perturbation's alone, as the winners have other settings, too: its own part is "
            f"that between {short(found.configs[WITH])} and the same with rho 0, on the same seeds"
        )
    return Table("Is it worth it?", ("best", "trials", "in the search", "fresh seeds"), lines, notes)


def draw(search: Search) -> Figure:
    """The metric of all trials against the first setting, and for each rho a line through the best ones."""
    name = next(iter(search.space))
    values = list(search.space[name])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = [*search.tried(WITHOUT).values(), *search.tried(WITH).values()]
    sign = 1 if rows[0]["mode"] == "min" else -1
    for rho in ["0", *search.radii]:
        of_rho = [row for row in rows if row["config"][RHO] == rho and math.isfinite(row["value"])]
        best: dict[int, float] = {}
        for row in of_rho:
            place = values.index(row["config"][name])
            best[place] = sign * min(sign * row["value"], sign * best.get(place, sign * math.inf))
        points = sorted(best.items())
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"rho {rho}")
            places = [values.index(row["config"][name]) for row in of_rho]
            axes.scatter(places, [row["value"] for row in of_rho], s=12, color=line.get_color(), alpha=0.4)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlabel(name.rpartition(".")[2])
    axes.set_ylabel(f"{rows[0]['metric']} ({'lower' if sign == 1 else 'higher'} is better)")
    axes.legend()
    return figure
