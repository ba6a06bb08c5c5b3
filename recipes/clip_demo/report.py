"""The demo's table, its plot of accuracy against shots, and its picture of sample predictions."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from recipes.clip_demo.run import ZERO_SHOT
from recipes.shared.ledger import Row
from recipes.shared.methods import COLOURS, OURS
from recipes.shared.statistics import estimate, with_error
from recipes.shared.tables import Table

_RIGHT, _WRONG = "#117733", "#aa3311"
_COLUMNS = 6  # images in a row of the picture


def table(rows: Sequence[Row], classes: int) -> Table:
    """A row for each method: accuracy in %, mean ± standard error over the seeds, and the cost of a step.

    Args:
        rows: of all runs.
        classes: their number, for chance.
    """
    shots = sorted({row["shots"] for row in rows if row["shots"]})
    seeds = len({row["seed"] for row in rows})
    precision = rows[0]["settings"]["precision"]
    title = f"Accuracy in %, {classes} classes (chance {100 / classes:.1f}), {seeds} seeds, {precision}"
    columns = ["method", *(f"{number} shot{'s' * (number > 1)}" for number in shots), "step x LoRA"]
    lines = [[ZERO_SHOT, *[f"{_accuracies(rows, ZERO_SHOT, 0)[0]:.1f}"] * len(shots), "-"]]
    for method in OURS:
        cells = [with_error(estimate(_accuracies(rows, method, number))) for number in shots]
        lines.append([method, *cells, f"{_relative_cost(rows, method):.2f}"])
    return Table(title, columns, lines)


def plot(rows: Sequence[Row], classes: int, path: Path) -> None:
    """Accuracy against shots, one line for each method with standard errors, as a PNG."""
    shots = sorted({row["shots"] for row in rows if row["shots"]})
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(OURS):
        means, errors, _ = zip(*(estimate(_accuracies(rows, method, number)) for number in shots), strict=True)
        shifted = [number * 1.04 ** (place - 1) for number in shots]  # so that error bars don't hide each other
        axes.errorbar(shifted, means, yerr=errors, label=method, color=COLOURS[method], marker="o", capsize=4)
    zero_shot = _accuracies(rows, ZERO_SHOT, 0)[0]
    axes.axhline(zero_shot, color="#666666", linestyle="--", label=f"{ZERO_SHOT}, {zero_shot:.1f} %")
    axes.axhline(100 / classes, color="#aaaaaa", linestyle=":", label=f"chance, {100 / classes:.1f} %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(number) for number in shots])
    axes.minorticks_off()
    seeds = len({row["seed"] for row in rows})
    axes.set(
        xlabel="shots: images of each class to train on",
        ylabel="test accuracy in %",
        title=f"A small CLIP trained here, adapted to a new drawing style\n(mean ± standard error of {seeds} seeds)",
        ylim=(0, None),
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def picture(
    examples: Sequence[tuple[Path, int]], names: Sequence[str], predictions: dict[str, Sequence[int]], path: Path
) -> None:
    """The first test image of each class with what it is and what models call it, as a PNG.

    Args:
        examples: paths and labels of the test part.
        names: of the classes.
        predictions: of each model, by its name, the labels given to the examples.
        path: of the picture.
    """
    firsts: dict[int, int] = {}
    for place, (_, label) in enumerate(examples):
        firsts.setdefault(label, place)
    rows = -(-len(firsts) // _COLUMNS)
    size = (2.2 * _COLUMNS, 2.1 * rows + 0.6)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1))
    legend = "; ".join(f"line {line}: {name}" for line, name in enumerate(predictions, 1))
    figure.suptitle(f"The first test image of each class, and what it is called\n{legend}; green is right", fontsize=12)
    drawn = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes in drawn:
        axes.set_axis_off()
    for axes, place in zip(drawn, firsts.values(), strict=False):
        image, label = examples[place]
        _show(axes, image, names[label], [names[of_model[place]] for of_model in predictions.values()])
    figure.savefig(path, dpi=110)


def _show(axes: Any, image: Path, name: str, answers: Sequence[str]) -> None:
    with Image.open(image) as opened:
        axes.imshow(opened)
    axes.set_title(name, fontsize=9, fontweight="bold")
    for line, answer in enumerate(answers):
        axes.text(
            0.5, -0.04 - 0.14 * line, answer, transform=axes.transAxes, ha="center", va="top", fontsize=8.5,
            color=_RIGHT if answer == name else _WRONG,
        )  # fmt: skip


def _accuracies(rows: Sequence[Row], method: str, shots: int) -> list[float]:
    """In %, of each seed."""
    return [100 * row["accuracy"] for row in rows if (row["method"], row["shots"]) == (method, shots)]


def _relative_cost(rows: Sequence[Row], method: str) -> float:
    """Median over shots and seeds of a step's time relative to LoRA's with the same shots and seed."""
    seconds: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        seconds[row["method"]][row["shots"], row["seed"]] = row["seconds_per_step"]
    return statistics.median(own / seconds["LoRA"][run] for run, own in seconds[method].items())
