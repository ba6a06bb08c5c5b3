"""What got flatter: slopes, curvatures and rises of the loss around kept adapters, as ratios of two arms."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from recipes.evidence.flatness import PARTS, RADII, RESULTS, SUBSPACES
from recipes.evidence.kept_report import with_judgements
from recipes.evidence.report import Report
from recipes.evidence.verdict import difference
from recipes.evidence.workloads import BASELINE, CANDIDATE, EXPLORED, TITLES
from recipes.shared.ledger import Row
from recipes.shared.statistics import estimate, with_error
from recipes.shared.tables import Table

_NAMES = {**SUBSPACES, "random": "random directions", "head": "head"}
_COLOURS = {"B": "#ee6677", "A": "#4477aa", "both": "#aa3377", "full": "#222222", "random": "#bbbbbb"}
_NOTES = (
    "mean ± standard error over the seeds; x: geometric mean of the ratios, paired by seed, with its 95 % interval; "
    "without a ratio where a value is not above 0",
    "slope: norm of the gradient for the adapted weights, projected on the subspace; trace: of the Hessian in it",
    "rise: of the loss at the steepest first-order move of the norm rho; random: mean of a direction and its opposite",
    "inputs: of the adapted layers, the share of their squared norm, mean over the layers",
)


@dataclass(frozen=True)
class Ratio:
    """A geometric mean of paired ratios, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"x {self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(arm: Mapping[int, float], other: Mapping[int, float]) -> Ratio | None:
    """Of the seeds that both have; None where there are fewer than two, or a value is not above 0.

    Example:
        >>> ratio({0: 2.0, 1: 2.0}, {0: 4.0, 1: 4.0})
        Ratio(mean=0.5, low=0.5, high=0.5)
    """
    if min([*arm.values(), *other.values()], default=0.0) <= 0:
        return None
    logarithms = [_logarithms(of_arm) for of_arm in (arm, other)]
    found = difference(*logarithms)
    return None if found is None else Ratio(2**found.estimate.mean, 2**found.low, 2**found.high)


def _logarithms(of_arm: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log2(value) for seed, value in of_arm.items()}


Place = tuple[str, ...]


def figures(row: Row) -> dict[Place, float]:
    """All numbers of an adapter by their place in its row, and shares of the squared slope and of the trace, in %."""
    found: dict[Place, float] = {(name,): row[name] for name in ("adapter_norm", "head_norm")}
    for part in PARTS:
        of_part = row[part]
        found[part, "loss"] = of_part["loss"]
        found[part, "inputs"] = 100 * statistics.mean(of_part["inputs"])
        for kind, power in (("gradient", 2), ("trace", 1)):
            whole = of_part[kind]["full"]
            for name, value in of_part[kind].items():
                found[part, kind, name] = value
                found[part, f"{kind} share", name] = 100 * (value / whole) ** power
        for name, rises in of_part["rise"].items():
            found |= {(part, "rise", name, rho): value for rho, value in rises.items()}
    return found


class FlatnessReport:
    """Of one workload's arms, with their chosen configurations.

    Args:
        report: of its runs.
    """

    def __init__(self, report: Report) -> None:
        self.workload = report.plan.workload
        self.name = f"{self.workload}_flatness"
        self._found: dict[str, dict[int, dict[Place, float]]] = {}
        for arm, pairs in with_judgements(report.rows, report.plan.folder / RESULTS).items():
            self._found[arm] = {row["seed"]: figures(judged) for row, judged in pairs if judged is not None}

    def is_empty(self) -> bool:
        """Whether no adapter of these arms has been measured."""
        return not self._found

    def by_seed(self, arm: str, *place: str) -> dict[int, float]:
        """One of the :func:`figures`, where it has been measured."""
        return {seed: found[place] for seed, found in self._found.get(arm, {}).items() if place in found}

    def ratio(self, arm: str, other: str, *place: str) -> Ratio | None:
        """Of two arms."""
        return ratio(self.by_seed(arm, *place), self.by_seed(other, *place))

    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of arms: each beside LoRA, except for what is explored, which EFMLoRA is compared with."""
        found = []
        for arm in self._found:
            if arm in EXPLORED and CANDIDATE in self._found:
                found.append((CANDIDATE, arm))
            elif arm != BASELINE:
                found.append((arm, BASELINE))
        return found

    def tables(self) -> list[Table]:
        """One for each comparison."""
        return [self._beside(arm, other) for arm, other in self.comparisons()]

    def _beside(self, arm: str, other: str) -> Table:
        lines = []
        for title, name in (("norm of s B A", "adapter_norm"), ("norm of the head", "head_norm")):
            lines.append([title, *self._cells(arm, other, 2, name), "", "", ""])
        for title, digits, place in _places():
            cells = []
            for part in PARTS:
                cells += self._cells(arm, other, digits, part, *place)
            lines.append([title, *cells])
        of_part = (TITLES[other], TITLES[arm], "ratio")
        columns = ["", *(f"{name}, train" for name in of_part), *(f"{name}, validation" for name in of_part)]
        return Table(f"{self.workload}, kept adapters: {TITLES[arm]} beside {TITLES[other]}", columns, lines, _NOTES)

    def _cells(self, arm: str, other: str, digits: int, *place: str) -> list[str]:
        cells = []
        for each in (other, arm):
            values = list(self.by_seed(each, *place).values())
            cells.append(with_error(estimate(values), f".{digits}f") if values else "-")
        return [*cells, str(self.ratio(arm, other, *place) or "")]

    def figure(self) -> Figure | None:
        """Ratios of all comparisons, by subspace, on both parts."""
        shown = [pair for pair in self.comparisons() if self.ratio(*pair, "train", "loss")]
        if not shown:
            return None
        figure = Figure(figsize=(12, 0.6 + 4 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), len(PARTS), sharey="row", squeeze=False)
        for row, (arm, other) in zip(panels, shown, strict=True):
            for axes, part in zip(row, PARTS, strict=True):
                self._draw(axes, arm, other, part)
            row[0].set_ylabel(f"{TITLES[arm]} / {TITLES[other]}")
        panels[0][0].legend(loc="best", fontsize="small")
        figure.suptitle(
            f"{self.workload}, kept adapters: geometric mean and 95 % interval of paired ratios (secondary)"
        )
        return figure

    def _draw(self, axes: Axes, arm: str, other: str, part: str) -> None:
        kinds = {"slope": ("gradient",), **{f"rise, rho {rho:g}": ("rise", f"{rho:g}") for rho in RADII}}
        kinds["trace"] = ("trace",)
        for column, (name, colour) in enumerate(_COLOURS.items()):
            places, found = [], []
            for place, (kind, *radius) in enumerate(kinds.values()):
                own = self.ratio(arm, other, part, kind, name, *radius)
                if own is not None:
                    places.append(place + (column - 2) / 8)
                    found.append(own)
            means = [own.mean for own in found]
            reach = [[own.mean - own.low for own in found], [own.high - own.mean for own in found]]
            axes.errorbar(places, means, yerr=reach, fmt="o", markersize=4, capsize=2, color=colour, label=_NAMES[name])
        axes.axhline(1, color="#888888", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("x {x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(range(len(kinds)), list(kinds))
        axes.grid(axis="y", which="both", alpha=0.3)
        axes.set_title({"train": "examples trained on", "validation": "validation part"}[part], fontsize="medium")


def _places() -> list[tuple[str, int, Place]]:
    """The lines of the table: title, digits, and the place in what was measured of a part."""
    lines: list[tuple[str, int, Place]] = [("loss", 3, ("loss",))]
    for name in (*SUBSPACES, "head"):
        lines.append((f"slope, {_NAMES[name]}", 3, ("gradient", name)))
    for name in ("B", "A", "both"):
        lines.append((f"share of the squared slope in %, {_NAMES[name]}", 1, ("gradient share", name)))
    for name in ("B", "A", "full"):
        lines.append((f"trace, {_NAMES[name]}", 1, ("trace", name)))
    for name in ("B", "A"):
        lines.append((f"share of the trace in %, {_NAMES[name]}", 1, ("trace share", name)))
    lines.append(("share of the inputs in A's rows in %", 1, ("inputs",)))
    for rho in RADII:
        for name in (*SUBSPACES, "random"):
            digits = 3
            if name == "random":  # where the smallest move makes a rise of about 1e-4
                digits = 6 if rho < 1 else 4
            lines.append((f"rise at rho {rho:g}, {_NAMES[name]}", digits, ("rise", name, f"{rho:g}")))
    return lines
