"""The result of a search: a table, a picture and one sentence."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib import colormaps
from matplotlib.figure import Figure
from pandas import DataFrame

from recipes.studies.colours import COLOURS
from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, with_error
from recipes.studies.tables import aligned
from recipes.tune.space import RHO, Config, short

WITHOUT, WITH, CONTROL = "without", "with", "control"
SIDES = (WITHOUT, WITH)
"""What is compared; the control is LoRA with the settings that won with the perturbation."""
_NAMES = {WITHOUT: "LoRA", CONTROL: "LoRA with the same other settings"}
TITLES = {WITHOUT: "without (LoRA)", WITH: "with the perturbation", CONTROL: "control (LoRA)"}
_NOT_LEARNT = "Nothing was learnt: train longer, or try higher rates, in another folder."
_NO_SEEDS = "The seeds change nothing: check that --seed_everything sets the adapter's start and the order of the data."
_OR_COARSE = "Or the metric is too coarse: take a loss, by --metric."


@dataclass(frozen=True)
class Answer:
    """The winners of both sides, and the control if there is one, on the seeds that compare them.

    Attributes:
        configs: settings of each side.
        values: values of the metric, by side and seed.
        less_is_better: whether a lower metric is better.
        trials: for each side without a control, the mean of each of the settings that were tried.
        is_fresh: whether these seeds were not used to choose the winners.
    """

    configs: Mapping[str, Config]
    values: Mapping[str, Mapping[int, float]]
    less_is_better: bool
    trials: Mapping[str, Sequence[float]]
    is_fresh: bool = True

    def difference(self, side: str) -> Estimate:
        """Return the difference of the perturbed side to another one, paired by seed."""
        return estimate([self.values[WITH][seed] - value for seed, value in self.values[side].items()])

    def gain(self, side: str) -> tuple[float, float]:
        """Return the 95 % interval of the gain over another side, where more is better."""
        found = self.difference(side)
        mean = -found.mean if self.less_is_better else found.mean
        return mean - found.interval, mean + found.interval

    def diverged(self, side: str) -> int:
        """Count the diverged runs of a side."""
        return sum(not math.isfinite(value) for value in self.values[side].values())

    @property
    def no_answer(self) -> str:
        """The reason why equal values say nothing; empty if they differ."""
        every = list(chain.from_iterable(self.trials.values()))
        groups: dict[str, tuple[Sequence[float], str]] = {"trials": (every, _NOT_LEARNT)}
        for side, found in self.values.items():
            if not self.diverged(side):
                groups[f"final runs {TITLES[side]}"] = list(found.values()), _NO_SEEDS
        for what, (values, reason) in groups.items():
            # A run that diverged has the worst number there is.
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
        """The one that is hardest to beat: one that is better for sure, or else by the low end of the gain."""
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
        """Return one sentence: use it, don't, not known yet, or why the runs give no answer."""
        if self.no_answer:
            return self.no_answer
        low, high = self.gain(self.rival)
        rho = self.configs[WITH][RHO]
        than = f"than {_NAMES[self.rival]}"
        if self.diverged(WITH):
            return f"Don't: it diverged in {self.diverged(WITH)} of its {len(self.values[WITH])} final runs."
        if high < 0:
            tried = f"with the best of the {len(self.trials[WITH])} settings tried"
            return f"Don't: it is worse {than}, by {-high:.3g} to {-low:.3g} (95 % interval), {tried}."
        for side in self.others:
            if self.diverged(side):
                runs = f"{self.diverged(side)} of its {len(self.values[side])} final runs"
                return f"Not known yet: {_NAMES[side]} diverged in {runs}. Search lower rates, in another folder."
        if low > 0:
            return f"Use it, with rho={rho}: it is better {than}, by {low:.3g} to {high:.3g} (95 % interval)."
        between = f"it is between {abs(low):.3g} worse and {high:.3g} better {than} (95 % interval)"
        return f"Not known yet: {between}. Until then, don't."

    @property
    def missing(self) -> list[str]:
        """What the runs lack to give a better answer."""
        missing = []
        if not self.is_fresh:
            missing.append(
                "The seeds that chose the winners also judge them, which favours the side with more settings: run both "
                "winners with fresh seeds, and name these by --fresh."
            )
        numbers = {side: len(self.trials[side]) for side in SIDES}
        if numbers[WITHOUT] != numbers[WITH]:
            missing.append(
                f"The sides are unequal: {numbers[WITHOUT]} settings were tried without the perturbation and "
                f"{numbers[WITH]} with it."
            )
        control = {**self.configs[WITH], RHO: "0"}
        if control not in self.configs.values():
            missing.append(
                f"There is no control: run LoRA with {short(control)} and the same seeds, since a gain may come from "
                "the other settings."
            )
        return missing

    def text(self, metric: str) -> str:
        """Make a table with a line for each side and each difference, and say what follows from it.

        Args:
            metric: name of the metric.
        """
        lines = [["best", "settings tried", "mean"]]
        for side in self.configs:
            number = str(len(self.trials[side])) if side in self.trials else ""
            lines.append([TITLES[side], number, with_error(estimate(list(self.values[side].values())), ".4f")])
        for side in self.others:
            difference = self.difference(side)
            interval = f"{difference.mean:+.4f}" + ("" if self.no_answer else f" ± {difference.interval:.4f}")
            lines.append([f"with - {side}, 95 % interval", "", interval])
        notes = [f"{TITLES[side]}: {short(config)}" for side, config in self.configs.items()]
        notes.append(
            f"{metric}, {'less' if self.less_is_better else 'more'} is better; mean and standard error over seeds "
            f"{', '.join(map(str, self.values[WITH]))}; differences are paired by seed"
        )
        if CONTROL in self.configs:
            notes.append(
                "The winners differ in more than rho, so the control is LoRA with the settings that won with the "
                "perturbation: the difference to it is due to the perturbation only. The answer compares with the LoRA "
                "that is harder to beat"
            )
        return "\n".join([aligned(lines), "", *notes, "", self.verdict(), *self.missing, ""])


def answer(rows: Sequence[Row], mode: str) -> Answer:
    """Return both winners, and the control if it was run, on the seeds that they share.

    Args:
        rows: runs, each with its ``config``, ``seed``, ``stage`` and ``value``. The stage is "final" for fresh seeds;
            if there are none, the seeds that chose the winners also judge them.
        mode: "min" or "max" of the value.

    Raises:
        MisconfigurationException: a side has no runs, or the winners share fewer than two seeds.
    """
    searched, final = by_config(rows, "search"), by_config(rows, "final")
    judging = searched if final.empty else final
    choosing = searched[searched.index.isin(judging.index)]
    configs = finalists(judging if choosing.empty else choosing, mode)
    keys = {side: _key(config) for side, config in configs.items() if _key(config) in judging.index}
    shared = judging.loc[list(keys.values())].dropna(axis=1)
    if shared.shape[1] < 2:
        raise MisconfigurationException(
            "the winners of both sides share fewer than two seeds: run both with the same seeds"
        )
    tried = (final if searched.empty else searched).mean(axis=1)
    return Answer(
        {side: configs[side] for side in keys},
        {side: shared.loc[key].to_dict() for side, key in keys.items()},
        mode == "min",
        {side: tried[tried.index.map(_side) == side].tolist() for side in SIDES},
        is_fresh=not final.empty,
    )


def chosen(rows: Sequence[Row], mode: str) -> dict[str, Config]:
    """Return the winners of a search by :func:`finalists`."""
    return finalists(by_config(rows, "search"), mode)


def finalists(runs: DataFrame, mode: str) -> dict[str, Config]:
    """Return each side's settings with the most seeds and, among those, the best mean.

    If they differ in more than rho, the control's are added: without it the difference would not be due to the
    perturbation only.

    Args:
        runs: table from :func:`by_config`.
        mode: "min" or "max" of the values.
    """
    sign = 1 if mode == "min" else -1
    found: dict[str, Config] = {}
    for side in SIDES:
        of_side = runs[runs.index.map(_side) == side]
        if of_side.empty:
            raise MisconfigurationException(f"there are no runs {side} the perturbation to compare with")
        seeds = of_side.count(axis=1)
        means = of_side[seeds == seeds.max()].mean(axis=1)
        # Among equals not the first, since a stopped run comes later.
        _, winner = min((sign * value, key) for key, value in means.items())
        found[side] = json.loads(winner)
    control = {**found[WITH], RHO: "0"}
    if control != found[WITHOUT]:
        found[CONTROL] = control
    return found


def by_config(rows: Sequence[Row], stage: str) -> DataFrame:
    """Return the values of a stage's runs, with a line per setting and a column per seed."""
    of_stage = [(_key(row["config"]), row["seed"], row["value"]) for row in rows if row["stage"] == stage]
    return DataFrame(of_stage, columns=["config", "seed", "value"]).pivot(
        index="config", columns="seed", values="value"
    )


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def _side(key: str) -> str:
    return WITH if float(json.loads(key)[RHO]) > 0 else WITHOUT


def draw(rows: Sequence[Row], setting: str, metric: str, mode: str) -> Figure:
    """Draw the values of all trials against a setting: LoRA in its colour, and each rho in a shade of EFMLoRA's."""
    trials = DataFrame([{**row["config"], "value": row["value"]} for row in rows])
    # By the first number of each value; values that are not numbers keep their order.
    trials["order"] = pandas.to_numeric(trials[setting].str.partition("/")[0], errors="coerce")
    trials = trials.sort_values("order", kind="stable")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.update_units(trials[setting].tolist())  # type: ignore[no-untyped-call]
    by_rho = trials.groupby(trials[RHO].astype(float))
    for place, (rho, of_rho) in enumerate(by_rho, 1):
        colour = colormaps["Oranges"](0.3 + 0.7 * place / len(by_rho)) if rho else COLOURS["LoRA"]
        values = of_rho[setting].tolist(), of_rho["value"].tolist()
        axes.plot(*values, "o", label=f"rho {rho:g}", color=colour, alpha=0.6)
    axes.set_xlabel(setting.rpartition(".")[2])
    axes.set_ylabel(f"{metric} ({mode} is best)")
    axes.legend()
    return figure
