"""What is kept of the accuracies, whatever costs them something: tables and a picture, by arm."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product

from matplotlib.figure import Figure

from recipes.evidence.verdict import BySeed, difference
from recipes.evidence.workloads import BASELINE, PROBE, TITLES
from recipes.shared.ledger import Row
from recipes.shared.methods import COLOURS
from recipes.shared.statistics import Estimate, estimate, mean_cell
from recipes.shared.tables import Table

Arms = Mapping[str, Sequence[Row]]
Measure = Callable[[Sequence[Row]], BySeed]
"""Takes the rows of an arm and gives a figure of each run."""

_OTHER_COLOURS = ("#ccbb44", "#aa3377", "#66ccee", "#bbbbbb", "#332288", "#882255", "#ddaa33", "#000000")
_MARKERS = ("o", "s", "^")
_APART = 0.01  # between the points of two arms, as a share of the axis


def with_adapters(rows: Arms) -> Arms:
    """Without the linear probe, which has no adapter."""
    return {arm: of_arm for arm, of_arm in rows.items() if arm != PROBE}


def kept_table(title: str, arms: Arms, measures: Mapping[str, Measure], notes: Sequence[str]) -> Table:
    """A column for each measure, by its title, and one for its difference to LoRA's."""
    columns = ["arm"]
    for name in measures:
        columns += [name, "minus LoRA's"]
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for measure in measures.values():
            own, base = measure(rows), measure(arms.get(BASELINE, ()))
            to_base = difference(own, base) if arm != BASELINE else None
            line += [mean_cell(list(own.values())), str(to_base or "")]
        lines.append(line)
    explained = "mean ± standard error over the seeds (seeds); differences: paired by seed, with 95 % intervals"
    return Table(title, columns, lines, [explained, *notes])


def before_and_after_table(title: str, arms: Arms, measures: Mapping[str, tuple[Measure, Measure]]) -> Table:
    """Means over the seeds; for each task by its name, a measure before and one after."""
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for before, after in measures.values():
            line.append(f"{statistics.mean(before(rows).values()):.1f} → {statistics.mean(after(rows).values()):.1f}")
        lines.append(line)
    return Table(title, ["arm", *measures], lines)


def kept_figure(title: str, label: str, arms: Arms, panels: Mapping[str, Mapping[float, Measure]]) -> Figure | None:
    """Test accuracies of all arms against a number, with 95 % intervals of the mean over the seeds.

    Args:
        title: of the picture.
        label: of the numbers.
        arms: with rows of runs on the test part.
        panels: by their title, what is measured at each number, in percent.

    Returns:
        None where there are no arms. Those with a single seed, whose mean has no interval, are left out, and so are
        the numbers at which an arm has no two runs.
    """
    drawn = {}
    for arm, rows in arms.items():
        seeds = {row["seed"] for row in rows}
        if len(seeds) > 1:
            drawn[arm] = rows
    if not drawn:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    # The colours come round again with another marker.
    others = cycle(product(_MARKERS, _OTHER_COLOURS))
    styles = {}
    for arm in drawn:
        own = COLOURS.get(TITLES[arm])
        styles[arm] = (_MARKERS[0], own) if own else next(others)
    for axes, (name, measures) in zip(all_axes, panels.items(), strict=True):
        for place, (arm, rows) in enumerate(drawn.items()):
            found: dict[float, Estimate] = {}
            for number, measure in measures.items():
                values = list(measure(rows).values())
                if len(values) > 1:
                    found[number] = estimate(values)
            # Side by side, so that no interval hides another one.
            shift = _APART * (max(measures) - min(measures)) * (place - (len(drawn) - 1) / 2)
            marker, colour = styles[arm]
            axes.errorbar(
                [number + shift for number in found],
                [one.mean for one in found.values()],
                yerr=[one.interval for one in found.values()],
                color=colour,
                marker=marker,
                capsize=3,
                label=TITLES[arm],
            )
        axes.set_title(name)
        axes.set_xticks(list(measures))
        axes.set_xlabel(label)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("mean test accuracy in %")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    return figure
