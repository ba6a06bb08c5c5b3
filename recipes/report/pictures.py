"""The landscapes as pictures: curves of all adapters in one picture, surfaces side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from recipes.report.numbers import LOSS, RADIUS, Measured, sam_name
from recipes.report.options import Options
from recipes.report.rounding import UPDATE, WAYS

_LEVELS = 16
_STYLES = ["o-", "s--", "^-.", "v:", "x:"]


def draw_curves(results: Sequence[Measured], options: Options, path: Path) -> None:
    """Draw the loss's rise along the adversarial direction, along random ones, and under noise, a line per adapter."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for index, result in enumerate(results):
        colour = f"C{index % 10}"  # matplotlib's own
        around, loss = result.landscape, result.value(LOSS)
        _adversarial(panels[0], result, options.rho, colour)
        _band(panels[1], around.shares, around.random - loss, colour)
        _band(panels[2], around.sigmas, around.noise - loss, colour)
    panels[0].plot([], [], "o", color="#444444", label=f"SAM, rho {', '.join(f'{rho:g}' for rho in options.rho)}")
    panels[0].legend()
    many = f"{options.directions} of them: mean and range"
    titles = (
        ("along the adversarial direction, and against it", "distance in full weight space (units of the weights)"),
        (f"along random directions of B\n{many}", "distance, relative to the weights' norm ‖W0‖"),
        (f"under draws of noise on the full weights\n{many}", "sigma, relative to the rows' norms"),
    )
    for axes, (title, below) in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=below, ylabel=f"rise of the loss ({_unit(results)})")
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.locator_params(axis="x", nbins=5)  # so that long numbers don't meet
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def draw_surfaces(results: Sequence[Measured], path: Path) -> None:
    """Draw the loss's rise on a plane through each adapter, with the same levels for all, as a PNG."""
    rises = [r.landscape.surface - r.value(LOSS) for r in results if r.landscape.surface is not None]
    # Otherwise the surfaces could not be compared.
    levels = MaxNLocator(_LEVELS).tick_values(*(float(edge) for edge in torch.stack(rises).aminmax()))
    figure = Figure(figsize=(5 * len(rises) + 1.2, 4.8), layout="constrained")
    grid = figure.subplots(1, len(rises), squeeze=False, sharex=True, sharey=True)
    for axes, result, rise in zip(grid.flat, results, rises, strict=True):
        plane = result.landscape.steps, result.landscape.shares, rise
        drawn = axes.contourf(*plane, levels=levels, cmap="viridis")
        axes.contour(*plane, levels=levels, colors="white", linestyles="solid", linewidths=0.5, alpha=0.6)
        axes.plot(0, 0, "x", color="#cc3311", markersize=10, markeredgewidth=2.5, label="the adapter")
        axes.set(title=_name(result), box_aspect=1)
    grid[0, 0].legend(loc="upper left")
    figure.supxlabel("along the adversarial direction (units of the weights)", fontsize="medium")
    figure.supylabel("along a random direction (relative to ‖W0‖)", fontsize="medium")
    figure.colorbar(drawn, ax=grid, label=f"rise of the loss ({_unit(results)})")
    figure.savefig(path, dpi=130)


def draw_rounding(results: Sequence[Measured], path: Path) -> None:
    """Draw each layer's update against its base's step, and the losses after rounding, as a PNG."""
    figure = Figure(figsize=(5 * len(results) + 1, 8.5), layout="constrained")
    grid = figure.subplots(2, len(results), squeeze=False, sharex=True, sharey="row")
    for sizes, below, result in zip(*grid, results, strict=True):
        losses, layers = result.rounding
        ratios = layers.drop(columns=UPDATE).rdiv(layers[UPDATE], axis="index").T
        shared: dict[str, Any] = {"xticks": range(len(ratios)), "grid": True, "legend": False}
        ratios.plot(ax=sizes, style="o", color="C0", alpha=0.3, logy=True, title=_name(result), **shared)
        losses.loc[ratios.index, list(WAYS)].plot(ax=below, style=_STYLES, xlabel="bits", **shared)
        below.axhline(result.value(LOSS), color="#444444", linewidth=0.8, label="not rounded")
    grid[1, 0].legend(loc="upper left")
    grid[0, 0].set_ylabel("update / step, a dot for each layer")
    grid[1, 0].set_ylabel(f"loss after rounding ({_unit(results)})")
    figure.savefig(path, dpi=130)


def _adversarial(axes: Any, result: Measured, rhos: Sequence[float], colour: str) -> None:
    """Draw the line, with a dot where SAM's perturbation of each rho ends."""
    rise = result.landscape.adversarial - result.value(LOSS)
    axes.plot(result.landscape.steps, rise, label=_name(result), color=colour)
    for rho in rhos:
        axes.plot(rho * result.value(RADIUS), result.value(sam_name(rho)), "o", markersize=7, color=colour)


def _band(axes: Any, x: Tensor, rises: Tensor, colour: str) -> None:
    """Draw mean and range over the first dimension."""
    axes.plot(x, rises.mean(0), color=colour)
    axes.fill_between(x, rises.amin(0), rises.amax(0), color=colour, alpha=0.18, linewidth=0)


def _name(result: Measured) -> str:
    return f"{result.label}, loss {result.value(LOSS):.3g}"


def _unit(results: Sequence[Measured]) -> str:
    return " or ".join(sorted({result.unit for result in results}))
