"""Draw ``method.png``: what the methods minimize, and the passes of a step.

From the root of a clone: ``PYTHONPATH=. python docs/results/method.py``.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.studies.colours import COLOURS

RHO = 0.55
LORA, EFMLORA = COLOURS["LoRA"], COLOURS["EFMLoRA"]


def loss(weights: np.ndarray) -> np.ndarray:
    """Return a loss with two minima: a sharp one, which is the lowest, and a flat one."""
    sharp = np.exp(-((weights + 1.6) ** 2) / 0.08)
    flat = 0.85 * np.exp(-((weights - 1.3) ** 2) / 1.6)
    return 1.2 - sharp - flat


def ball(axes: Axes, center: float, colour: str, text: str) -> None:
    """Draw the weights within rho of a minimum, and the highest loss among them."""
    within = np.linspace(center - RHO, center + RHO, 201)
    losses = loss(within)
    worst, lowest = losses.max(), losses.min()
    axes.fill_between(within, losses, worst, color=colour, alpha=0.25, linewidth=0)
    axes.plot([within[0], within[-1]], [worst, worst], color=colour, linewidth=3)
    axes.plot(center, lowest, "o", color=colour, markersize=9)
    axes.annotate(text, (center, lowest - 0.15), ha="center", color=colour, fontweight="bold")
    axes.annotate("worst loss\nwithin rho", (center, worst + 0.05), ha="center", color=colour)


def objective(axes: Axes) -> None:
    """Draw the loss, and the ball around each minimum."""
    weights = np.linspace(-3.3, 3.6, 1500)
    axes.plot(weights, loss(weights), color="black")
    ball(axes, -1.6, LORA, "LoRA's aim")
    ball(axes, 1.3, EFMLORA, "EFMLoRA's and FMLoRA's aim")
    axes.set(xlabel="weights", ylabel="loss", xticks=[], yticks=[], ylim=(-0.1, 1.6))
    axes.set_title("At a flat minimum the loss is low all around")


def passes(axes: Axes) -> None:
    """Draw the passes of a step on a timeline."""
    parts = {
        "LoRA": ["pass at B"],
        "EFMLoRA": ["pass at B +\naverage of E"],
        "FMLoRA": ["pass at B,\nfor E", "pass at B + E"],
    }
    for place, (method, texts) in enumerate(parts.items()):
        for start, text in enumerate(texts):
            axes.barh(place, 1, left=start, color=COLOURS[method], edgecolor="white", linewidth=3, height=0.6)
            axes.text(start + 0.5, place, text, ha="center", va="center", color="white", fontweight="bold")
        axes.barh(place, 0.18, left=len(texts), color="dimgray", edgecolor="white", linewidth=3, height=0.6)
        axes.text(len(texts) + 0.09, place, "step", ha="center", va="center", color="white", rotation=90)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.tick_params("y", length=0, labelsize="large")
    axes.invert_yaxis()
    axes.set(xlabel="time of a step", xticks=[])
    axes.set_title("EFMLoRA takes one pass per step, like LoRA")


def main() -> None:
    """Draw both parts."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    objective(left)
    passes(right)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    right.spines["left"].set_visible(False)
    figure.savefig("docs/results/method.png", dpi=130)


if __name__ == "__main__":
    main()
