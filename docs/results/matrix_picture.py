"""The picture of protocol_matrix.md's results: each method against the best LoRA, under each disturbance."""

from collections.abc import Mapping, Sequence
from itertools import product

import matrix_b
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matrix_choice import DISTURBED, LORA, STRENGTHS, chosen, settings_of  # in this folder
from matrix_rates import LOWER
from matrix_rule import WORTH, WORTH_B
from matrix_table import difference, finals_of

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate

BETTER, EVEN, WORSE, NONE = "#a6cee3", "#eeeeee", "#fdbf6f", "white"  # blue and orange, which everybody can tell apart
MEANINGS = {
    BETTER: "better than LoRA",
    EVEN: "no sure difference, or a small one",
    WORSE: "worse than LoRA",
    NONE: "no fair setting",
}
RELEARNING = "relearning"
Cells = Mapping[tuple[str, str], Estimate | None]
"""By disturbance and method the difference to LoRA; None if no setting of the method was within the bounds."""


def cells_of_a(rows: Sequence[Row]) -> Cells:
    """Return the differences of the test loss, in nats, of column A's arms and of its audit's, if these have rows."""
    settings, finals = settings_of(rows), finals_of(rows)
    names = {row["arm"] for row in rows}
    found = {}
    for disturbance, arm in product(DISTURBED, (*STRENGTHS, *LOWER.values())):
        if arm in names and arm != LORA:
            own, of_lora = (chosen(settings, each, disturbance) for each in (arm, LORA))
            found[disturbance, arm] = difference(finals, own, of_lora, disturbance) if own and of_lora else None
    return found


def cells_of_b(rows: Sequence[Row]) -> Cells:
    """Return column B's differences of the recall."""
    settings, finals = matrix_b.settings_of(rows), finals_of(rows)
    found: dict[tuple[str, str], Estimate | None] = {}
    for arm in matrix_b.TESTED.values():
        of = matrix_b.compared(settings, finals, arm)
        found[RELEARNING, arm] = of.difference if of else None
    return found


def draw(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Figure:
    """Draw both columns, the second one when its rows decide: tables whose cells are coloured by their intervals."""
    title = "loss under a disturbance, minus that of LoRA with rates of 2.5e-4 or more (nats)"
    panels = [(title, cells_of_a(rows_a), WORTH)]
    if matrix_b.is_decided(rows_b):
        title = "share of the hidden facts that are recalled after an attack, minus LoRA's"
        panels.append((title, cells_of_b(rows_b), WORTH_B))
    heights = []
    for _, cells, _ in panels:
        heights.append(len({disturbance for disturbance, _ in cells}))
    figure = Figure(figsize=(10.5, 1.2 + 0.36 * sum(heights)), layout="constrained")
    every = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (title, cells, least) in zip(every.flat, panels, strict=True):
        _fill(axes, cells, least)
        axes.set_title(title)
    patches = [Patch(facecolor=colour, edgecolor="gray", label=meaning) for colour, meaning in MEANINGS.items()]
    title = "95 % intervals, each for itself"
    figure.legend(handles=patches, title=title, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _fill(axes: Axes, cells: Cells, least: float) -> None:
    """Draw a table of differences; lower ones are better."""
    disturbances = list(dict.fromkeys(disturbance for disturbance, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    for (row, disturbance), (column, method) in product(enumerate(disturbances), enumerate(methods)):
        found = cells[disturbance, method]
        axes.fill_between([column - 0.48, column + 0.48], row - 0.46, row + 0.46, color=colour_of(found, least))
        axes.text(column, row, _text(found), ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(methods)), [method.replace(", ", ",\n") for method in methods])
    axes.set_yticks(range(len(disturbances)), disturbances)
    axes.set(xlim=(-0.5, len(methods) - 0.5), ylim=(len(disturbances) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def colour_of(found: Estimate | None, least: float) -> str:
    """Return a cell's colour: whether its interval lies below 0, above 0, or around it.

    Args:
        found: the difference to LoRA.
        least: a smaller one counts as none.
    """
    if found is None:
        return NONE
    if abs(found.mean) <= found.interval or abs(found.mean) < least:
        return EVEN
    return BETTER if found.mean < 0 else WORSE  # nan, of a run that diverged, is worse


def _text(found: Estimate | None) -> str:
    return "" if found is None else f"{found.mean:+.2f} ± {found.interval:.2f}"
