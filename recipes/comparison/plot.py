"""The comparison's pictures: gains, sharpness against error, cost against gain, and the curves of the choices."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from recipes.clip_demo.run import Row
from recipes.comparison.methods import ALL, METHODS
from recipes.comparison.summary import (
    BASELINE,
    Estimate,
    Outcome,
    of_task,
    outcomes,
    sharpness_correlation,
    told_seeds,
    tuning,
    within_seeds,
)
from recipes.comparison.task import Config

Found = Mapping[str, Sequence[Outcome]]

_COLOURS = {name: matplotlib.colormaps["tab10"](place % 10) for place, name in enumerate(ALL)}
_MARKERS = dict(zip(ALL, itertools.cycle("osD^v<>PX*hpd8H"), strict=False))
_TUNED = {  # by the names of the grids
    "learning rate": ("learning_rate", "full_learning_rate"),
    "rho, in full weight space": ("rho",),
    "rho, in the space of the trained weights": ("lora_rho", "sam_rho"),
    "sigma": ("sigma",),
    "alpha": ("alpha",),
}


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write all pictures of which there is something to show, as PNGs; returns their paths."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    found = {task: done for task in tasks if (done := outcomes(rows, task))}
    compared = {task: done for task, done in found.items() if any(o.gain for o in done)}
    drawn: dict[str, tuple[Mapping[str, Any], Callable[[], Figure]]] = {
        "gain": (compared, lambda: _panels(compared, _gains, legend=False)),
        "sharpness": (compared, lambda: _panels(compared, _sharpness, legend=True)),
        "tuning": (tasks, lambda: _tuning({task: of_task(rows, task) for task in tasks})),
        "cost": (compared, lambda: _cost(compared)),
    }
    written = []
    for name, (shown, draw) in drawn.items():
        if shown:
            written.append(folder / f"{name}.png")
            draw().savefig(written[-1], dpi=130)
    return written


def _panels(found: Found, draw: Callable[[Any, str, Sequence[Outcome]], None], legend: bool) -> Figure:
    """A panel for each task, and one legend for all."""
    columns = min(len(found), 3)
    height = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns + 2 * legend, 4.2 * height), layout="constrained")
    grid = list(figure.subplots(height, columns, squeeze=False, sharex=True).flat)
    for axes, (task, own) in zip(grid, found.items(), strict=False):
        draw(axes, task, own)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    if legend:
        _one_legend(figure)
    return figure


def _one_legend(figure: Figure) -> None:
    """Of all panels together, beside them."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside right center")


def _gains(axes: Any, task: str, found: Sequence[Outcome]) -> None:
    seeds = max(len(outcome.runs) for outcome in found)
    shown = [(outcome, outcome.gain) for outcome in found if outcome.gain][::-1]
    for place, (outcome, gain) in enumerate(shown):
        axes.errorbar(gain.mean, place, xerr=gain.interval, color=_COLOURS[outcome.method], marker="o", capsize=4)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(shown)), [told_seeds(outcome, seeds) for outcome, _ in shown])
    (base,) = [outcome for outcome in found if outcome.method == BASELINE]
    axes.set(
        title=f"{task} (LoRA {base.accuracy.mean:.1f} %)",
        xlabel="test accuracy minus LoRA's with the same seed,\npercentage points (mean and 95 % interval)",
    )
    axes.grid(axis="x", alpha=0.3)


def _sharpness(axes: Any, task: str, found: Sequence[Outcome]) -> None:
    deviations = within_seeds(found)
    for name in dict.fromkeys(deviation.method for deviation in deviations):
        points = [(d.sharpness, d.error) for d in deviations if d.method == name]
        style = {"color": _COLOURS[name], "marker": _MARKERS[name], "alpha": 0.8}
        axes.scatter(*zip(*points, strict=True), label=name, **style)
    radius = next(iter(found[0].runs.values()))["settings"]["sharpness_rho"]
    axes.set(
        title=f"{task}: rank correlation {sharpness_correlation(found):.2f}",
        xlabel=f"sharpness relative to the mean of the seed\n(training examples, full weight space, rho {radius:g})",
        ylabel="test error minus the mean of the seed,\npercentage points",
    )
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.grid(alpha=0.3)


def _tuning(rows: Mapping[str, Sequence[Row]]) -> Figure:
    """Validation accuracy against each method's one hyper-parameter, beside what LoRA's best learning rate reaches."""
    figure = Figure(figsize=(4.2 * len(_TUNED) + 2, 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(_TUNED), squeeze=False, sharey="row")
    for line, (task, own) in zip(grid, rows.items(), strict=True):
        for axes, (parameter, grids) in zip(line, _TUNED.items(), strict=True):
            axes.set(title=task, xlabel=parameter, xscale="log")
            _curves(axes, {name: tuning(own, name) for name, method in METHODS.items() if method.grid in grids})
            if base := [accuracy for _, accuracy in tuning(own, BASELINE)]:
                axes.axhline(max(base).mean, color="black", linestyle="--", label="best LoRA")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("validation accuracy in %,\nmean and range of two seeds")
    _one_legend(figure)
    return figure


def _curves(axes: Any, curves: Mapping[str, Sequence[tuple[Config, Estimate]]]) -> None:
    """Of the methods in a panel, a little apart."""
    ticks = set()
    for place, (name, curve) in enumerate((name, curve) for name, curve in curves.items() if curve):
        values = [config[ALL[name].parameter] for config, _ in curve]
        ticks |= set(values)
        means, errors, _ = zip(*(accuracy for _, accuracy in curve), strict=True)
        style = {"color": _COLOURS[name], "marker": _MARKERS[name], "capsize": 3}
        axes.errorbar([value * 1.03**place for value in values], means, yerr=errors, label=name, **style)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)], rotation=45)
    axes.minorticks_off()


def _cost(found: Found) -> Figure:
    """What a step costs against what the method gains, means over all tasks: of methods that have been run on all."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in METHODS:
        own = [outcome for done in found.values() for outcome in done if outcome.method == name]
        points = [(outcome.cost, outcome.gain.mean) for outcome in own if outcome.gain and outcome.cost]
        if len(points) == len(found):
            costs, gains = zip(*points, strict=True)
            place = (statistics.geometric_mean(costs), statistics.mean(gains))
            axes.scatter(*place, s=60, label=name, color=_COLOURS[name], marker=_MARKERS[name])
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(
        title=f"Cost against gain, {len(found)} task{'s' * (len(found) > 1)}",
        xlabel="time of a training step relative to LoRA's (mean over tasks)",
        ylabel="gain in test accuracy over LoRA,\npercentage points (mean over tasks)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure
