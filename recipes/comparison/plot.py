"""The comparison's pictures: gains, sharpness against error, cost against gain, and the curves of the choices."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from recipes.clip_demo.run import Row
from recipes.comparison.methods import ALL
from recipes.comparison.summary import BASELINE, Outcome, of_task, outcomes, sharpness_correlation, tuning

_COLOURS = {name: matplotlib.colormaps["tab20"](place) for place, name in enumerate(ALL)}
_MARKERS = dict(zip(ALL, itertools.cycle("osD^v<>PX*hpd8H"), strict=False))


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write all pictures of which there is something to show, as PNGs; returns their paths."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    found = {task: done for task in tasks if (done := outcomes(rows, task))}
    panels: dict[str, tuple[Sequence[str], Callable[[Any, str], None]]] = {
        "gain": ([task for task in found if any(o.gain for o in found[task])], lambda a, t: _gains(a, t, found[t])),
        "sharpness": (list(found), lambda axes, task: _sharpness(axes, task, found[task])),
        "tuning": (list(tasks), lambda axes, task: _tuning(axes, task, of_task(rows, task))),
    }
    written = []
    for name, (shown, draw) in panels.items():
        if shown:
            written.append(folder / f"{name}.png")
            _panels(shown, draw, legend=name != "gain").savefig(written[-1], dpi=130)
    if panels["gain"][0]:
        written.append(folder / "cost.png")
        _cost(found).savefig(written[-1], dpi=130)
    return written


def _panels(tasks: Sequence[str], draw: Callable[[Any, str], None], legend: bool) -> Figure:
    """A panel for each task, and one legend for all."""
    columns = min(len(tasks), 3)
    height = -(-len(tasks) // columns)
    figure = Figure(figsize=(5 * columns + 2 * legend, 4.2 * height), layout="constrained")
    grid = list(figure.subplots(height, columns, squeeze=False).flat)
    labels: dict[str, Any] = {}
    for axes, task in zip(grid, tasks, strict=False):
        draw(axes, task)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    if legend:
        figure.legend(labels.values(), labels.keys(), loc="outside right center")
    return figure


def _gains(axes: Any, task: str, found: Sequence[Outcome]) -> None:
    shown = [(outcome, outcome.gain) for outcome in found if outcome.gain][::-1]
    for place, (outcome, gain) in enumerate(shown):
        axes.errorbar(gain.mean, place, xerr=gain.error, color=_COLOURS[outcome.method], marker="o", capsize=4)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(shown)), [outcome.method for outcome, _ in shown])
    (base,) = [outcome for outcome in found if outcome.method == BASELINE]
    axes.set(
        title=f"{task} (LoRA {base.accuracy.mean:.1f} %)",
        xlabel="test accuracy minus LoRA's with the same seed,\npercentage points (mean ± standard error)",
    )
    axes.grid(axis="x", alpha=0.3)


def _sharpness(axes: Any, task: str, found: Sequence[Outcome]) -> None:
    for outcome in found:
        measured = [row for row in outcome.runs.values() if "sharpness" in row]
        points = [(row["sharpness"], 100 * (1 - row["accuracy"])) for row in measured]
        if points:
            style = {"color": _COLOURS[outcome.method], "marker": _MARKERS[outcome.method], "alpha": 0.8}
            axes.scatter(*zip(*points, strict=True), label=outcome.method, **style)
    correlation, p = sharpness_correlation(found)
    radius = next(iter(found[0].runs.values()))["settings"]["sharpness_rho"]
    axes.set(
        title=f"{task}: rank correlation {correlation:.2f} (p {p:.2g})",
        xlabel=f"sharpness on the training examples, nats\n(in full weight space, rho {radius:g})",
        ylabel="test error in %",
    )
    axes.set_xscale("symlog", linthresh=1e-3, subs=(2, 5))
    for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_format("{x:g}")
    axes.tick_params(axis="x", which="both", labelrotation=45)
    axes.grid(alpha=0.3)


def _tuning(axes: Any, task: str, rows: Sequence[Row]) -> None:
    """Validation accuracy against each method's own hyper-parameter, beside what LoRA's best learning rate reaches."""
    for name, method in ALL.items():
        curve = tuning(rows, name)
        if method.start != BASELINE or len(curve) < 2 or method.parameter not in ("rho", "sigma", "alpha"):
            continue
        values = [config[method.parameter] for config, _ in curve]
        label = f"{name} ({method.parameter})"
        means, errors = zip(*(accuracy for _, accuracy in curve), strict=True)
        axes.errorbar(values, means, yerr=errors, label=label, color=_COLOURS[name], marker=_MARKERS[name], capsize=3)
    if base := [accuracy for _, accuracy in tuning(rows, BASELINE)]:
        best = max(base)
        axes.axhline(best.mean, color="black", linestyle="--", label="LoRA, mean ± standard error")
        axes.axhspan(best.mean - best.error, best.mean + best.error, color="black", alpha=0.1)
    axes.set(title=task, xlabel="the method's own hyper-parameter", ylabel="validation accuracy in %", xscale="log")
    axes.grid(alpha=0.3)


def _cost(found: dict[str, list[Outcome]]) -> Figure:
    """What a step costs against what the method gains, means over the tasks."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in ALL:
        own = [outcome for done in found.values() for outcome in done if outcome.method == name]
        points = [(outcome.cost, outcome.gain.mean) for outcome in own if outcome.gain and outcome.cost]
        if points:
            cost, gain = (statistics.mean(column) for column in zip(*points, strict=True))
            label = f"{name} ({len(points)} task{'s' * (len(points) > 1)})"
            axes.scatter(cost, gain, s=60, label=label, color=_COLOURS[name], marker=_MARKERS[name])
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(
        title="Cost against gain",
        xlabel="time of a training step relative to LoRA's (mean over tasks)",
        ylabel="gain in test accuracy over LoRA,\npercentage points (mean over tasks)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure
