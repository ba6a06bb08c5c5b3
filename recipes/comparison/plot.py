"""The comparison's pictures: gains, sharpness against error, cost against gain, and the curves of the choices."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from recipes.comparison.methods import ALL, METHODS
from recipes.comparison.summary import (
    BASELINE,
    Outcome,
    name_with_seeds,
    of_task,
    outcomes,
    sharpness_correlation,
    tuning,
    within_seeds,
)
from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate
from recipes.studies.plan import Config

ByTask = Mapping[str, Sequence[Outcome]]

_COLOURS = {name: matplotlib.colormaps["tab10"](place % 10) for place, name in enumerate(ALL)}
_MARKERS = dict(zip(ALL, cycle("osD^v<>PX*hpd8H"), strict=False))
_TUNED = {  # by the names of the grids
    "learning rate": ("learning_rate", "full_learning_rate"),
    "rho, in full weight space": ("rho",),
    "rho, in the space of the trained weights": ("lora_rho", "sam_rho"),
    "sigma": ("sigma",),
    "alpha": ("alpha",),
}


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a PNG of each picture that has something to show; returns their paths."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    compared = {}
    for task in tasks:
        done = outcomes(rows, task)
        if any(outcome.gain for outcome in done):
            compared[task] = done
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


def _panels(by_task: ByTask, draw: Callable[[Any, str, Sequence[Outcome]], None], legend: bool) -> Figure:
    """A panel for each task, and one legend for all."""
    columns = min(len(by_task), 3)
    height = -(-len(by_task) // columns)
    figure = Figure(figsize=(5 * columns + 2 * legend, 4.2 * height), layout="constrained")
    grid = list(figure.subplots(height, columns, squeeze=False, sharex=True).flat)
    for axes, (task, task_outcomes) in zip(grid, by_task.items(), strict=False):
        draw(axes, task, task_outcomes)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(by_task) :]:
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


def _gains(axes: Any, task: str, task_outcomes: Sequence[Outcome]) -> None:
    seeds = max(len(outcome.runs) for outcome in task_outcomes)
    shown = [(outcome, outcome.gain) for outcome in task_outcomes if outcome.gain][::-1]
    for place, (outcome, gain) in enumerate(shown):
        axes.errorbar(gain.mean, place, xerr=gain.interval, color=_COLOURS[outcome.method], marker="o", capsize=4)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(shown)), [name_with_seeds(outcome, seeds) for outcome, _ in shown])
    (base,) = [outcome for outcome in task_outcomes if outcome.method == BASELINE]
    axes.set(
        title=f"{task} (LoRA {base.accuracy.mean:.1f} %)",
        xlabel="test accuracy minus LoRA's with the same seed,\npercentage points (mean and 95 % interval)",
    )
    axes.grid(axis="x", alpha=0.3)


def _sharpness(axes: Any, task: str, task_outcomes: Sequence[Outcome]) -> None:
    deviations = within_seeds(task_outcomes)
    for name in dict.fromkeys(deviation.method for deviation in deviations):
        points = [(d.sharpness, d.error) for d in deviations if d.method == name]
        style = {"color": _COLOURS[name], "marker": _MARKERS[name], "alpha": 0.8}
        axes.scatter(*zip(*points, strict=True), label=name, **style)
    radius = next(iter(task_outcomes[0].runs.values()))["settings"]["sharpness_rho"]
    axes.set(
        title=f"{task}: rank correlation {sharpness_correlation(task_outcomes):.2f}",
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
    for line, (task, task_rows) in zip(grid, rows.items(), strict=True):
        for axes, (parameter, grids) in zip(line, _TUNED.items(), strict=True):
            axes.set(title=task, xlabel=parameter, xscale="log")
            _curves(axes, {name: tuning(task_rows, name) for name, method in METHODS.items() if method.grid in grids})
            base = [accuracy.mean for _, accuracy in tuning(task_rows, BASELINE)]
            if base:
                axes.axhline(max(base), color="black", linestyle="--", label="best LoRA")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("validation accuracy in %,\nmean and range of two seeds")
    _one_legend(figure)
    return figure


def _curves(axes: Any, curves: Mapping[str, Sequence[tuple[Config, Estimate]]]) -> None:
    """Of the methods in a panel, a little apart."""
    ticks = set()
    shown = {name: curve for name, curve in curves.items() if curve}
    for place, (name, curve) in enumerate(shown.items()):
        values = [config[ALL[name].parameter] for config, _ in curve]
        ticks |= set(values)
        means, errors, _ = zip(*(accuracy for _, accuracy in curve), strict=True)
        style = {"color": _COLOURS[name], "marker": _MARKERS[name], "capsize": 3}
        axes.errorbar([value * 1.03**place for value in values], means, yerr=errors, label=name, **style)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)], rotation=45)
    axes.minorticks_off()


def _cost(by_task: ByTask) -> Figure:
    """What a step costs against what the method gains, means over all tasks: of methods that have been run on all."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in METHODS:
        costs, gains = [], []
        for outcome in chain.from_iterable(by_task.values()):
            if outcome.method == name and outcome.gain and outcome.cost:
                costs.append(outcome.cost)
                gains.append(outcome.gain.mean)
        if len(costs) == len(by_task):
            place = (statistics.geometric_mean(costs), statistics.mean(gains))
            axes.scatter(*place, s=60, label=name, color=_COLOURS[name], marker=_MARKERS[name])
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(
        title=f"Cost against gain, {len(by_task)} task{'s' * (len(by_task) > 1)}",
        xlabel="time of a training step relative to LoRA's (mean over tasks)",
        ylabel="gain in test accuracy over LoRA,\npercentage points (mean over tasks)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure
