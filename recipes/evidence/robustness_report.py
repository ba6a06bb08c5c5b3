"""How each method bears changes of its weights and of the texts, beside LoRA: tables and a forest plot."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.evidence.conditions import AS_TRAINED, CONDITIONS
from recipes.evidence.kept_report import difference_cell, with_judgements
from recipes.evidence.report import Report
from recipes.evidence.robustness import RESULTS
from recipes.evidence.verdict import Difference, difference
from recipes.evidence.workloads import BASELINE, SEARCHES, TITLES
from recipes.shared.statistics import mean_cell
from recipes.shared.tables import Table

# By the names in the rows: what a table calls it, the factor to its unit, and the digits shown.
_MEASURES = {
    "accuracy": ("accuracy in %", 100.0, 2),
    "loss": ("loss in nats", 1.0, 3),
    "loss_scaled": ("loss in nats after temperature scaling", 1.0, 3),
    "ece": ("ECE in %", 100.0, 2),
    "ece_scaled": ("ECE in % after temperature scaling", 100.0, 2),
}
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_INCHES = 0.16  # of the forest plot for each difference


class RobustnessReport:
    """Of one workload's arms, with their chosen configurations.

    Args:
        report: of its runs.
    """

    def __init__(self, report: Report) -> None:
        self.workload = report.plan.workload
        self.name = f"{self.workload}_robustness"
        self._found = with_judgements(report.rows, report.plan.folder / RESULTS)

    def is_empty(self) -> bool:
        """Whether no adapter of these arms has been judged."""
        return not self._found

    def by_seed(self, arm: str, condition: str, measure: str) -> dict[int, float]:
        """In the unit of the table. A run that has failed counts with the accuracy of chance, and has nothing else."""
        factor = _MEASURES[measure][1]
        found = {}
        for row, judged in self._found.get(arm, ()):
            if judged is not None:
                found[row["seed"]] = factor * judged["conditions"][condition][measure]
            elif row["failed"] and measure == "accuracy":
                found[row["seed"]] = factor * row["chance"]
        return found

    def lost(self, arm: str, condition: str, measure: str) -> dict[int, float]:
        """What a condition changes, against the same adapter as it was trained."""
        as_trained = self.by_seed(arm, AS_TRAINED, measure)
        return {seed: value - as_trained[seed] for seed, value in self.by_seed(arm, condition, measure).items()}

    def differences(self, arm: str, measure: str) -> dict[str, Difference]:
        """To LoRA, by condition, paired by seed."""
        found = {}
        for name in CONDITIONS:
            own = difference(self.by_seed(arm, name, measure), self.by_seed(BASELINE, name, measure))
            if own is not None:
                found[name] = own
        return found

    def tables(self) -> list[Table]:
        """One for each measure, and one for the accuracy that each condition costs."""
        others = [arm for arm in self._found if arm != BASELINE]
        columns = ("condition", "LoRA", *(f"{TITLES[arm]} minus LoRA" for arm in others))
        tables = []
        for measure, (title, _, digits) in _MEASURES.items():
            of_arms = [self.differences(arm, measure) for arm in others]
            lines = []
            for name, condition in CONDITIONS.items():
                own = mean_cell(list(self.by_seed(BASELINE, name, measure).values()), digits)
                lines.append([condition.title, own, *(difference_cell(of_arm.get(name), digits) for of_arm in of_arms)])
            notes = ["LoRA: mean ± standard error (seeds); differences: paired by seed, with 95 % intervals"]
            tables.append(Table(f"{self.workload}, kept adapters: {title}", columns, lines, notes))
        return [*tables, self._costs(columns, others)]

    def _costs(self, columns: Sequence[str], others: Sequence[str]) -> Table:
        lines = []
        for name, condition in CONDITIONS.items():
            if name == AS_TRAINED:
                continue
            base = self.lost(BASELINE, name, "accuracy")
            cells = [difference_cell(difference(self.lost(arm, name, "accuracy"), base), 2) for arm in others]
            lines.append([condition.title, mean_cell(list(base.values()), 2), *cells])
        notes = ["A positive difference: the method loses less than LoRA, from its own accuracy"]
        return Table(f"{self.workload}, kept adapters: change of accuracy in points", columns, lines, notes)

    def figure(self) -> Figure | None:
        """Differences of the searched methods to LoRA with their intervals, by condition and measure."""
        methods = [arm for arm in SEARCHES if arm != BASELINE and self.differences(arm, "accuracy")]
        if not methods:
            return None
        height = 2 + _INCHES * (len(methods) + 1) * len(CONDITIONS)
        figure = Figure(figsize=(20, height), layout="constrained")
        panels = figure.subplots(1, len(_MEASURES), sharey=True)
        for axes, (measure, (title, _, _)) in zip(panels, _MEASURES.items(), strict=True):
            for place, method in enumerate(methods):
                below = place / (len(methods) + 1)
                _draw(axes, self.differences(method, measure), below, TITLES[method], _COLOURS[place])
            axes.axvline(0, color="#888888", linewidth=1)
            axes.set_xlabel(f"{title},\nminus LoRA's")
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(CONDITIONS)), [condition.title for condition in CONDITIONS.values()])
        panels[0].invert_yaxis()  # the first condition at the top, as in the tables
        panels[0].legend(loc="best", fontsize="small")
        figure.suptitle(f"{self.workload}, kept adapters: mean and 95 % interval of paired differences (secondary)")
        return figure


def _draw(axes: Axes, differences: Mapping[str, Difference], below: float, label: str, colour: str) -> None:
    """The differences of one method, below those of the methods before it."""
    names = list(CONDITIONS)
    places = [names.index(name) + below for name in differences]
    means = [found.estimate.mean for found in differences.values()]
    halves = [found.estimate.interval for found in differences.values()]
    axes.errorbar(means, places, xerr=halves, fmt="o", markersize=3, capsize=2, color=colour, label=label)
