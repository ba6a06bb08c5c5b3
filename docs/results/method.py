"""Draws ``method.png``: what the methods minimize, and what happens in a step. Run it from the root of a clone."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RHO = 0.6
FORWARD, PERTURBATION, STEP = "tab:blue", "tab:orange", "tab:green"


def objective(axes: Axes) -> None:
    """Draw a loss with a sharp and a flat minimum, and the worst loss within rho of each weight."""
    weights = np.linspace(-3.2, 3.4, 1500)
    loss = 1.2 - np.exp(-((weights + 1.6) ** 2) / 0.08) - 0.85 * np.exp(-((weights - 1.3) ** 2) / 1.6)
    worst = np.array([loss[np.abs(weights - weight) <= RHO].max() for weight in weights])
    axes.plot(weights, loss, color="black", label="loss: LoRA minimizes it")
    axes.plot(weights, worst, color=PERTURBATION, label="worst loss within rho: FMLoRA and EFMLoRA")
    axes.plot(weights[loss.argmin()], loss.min(), "o", color="black")
    axes.plot(weights[worst.argmin()], worst.min(), "o", color=PERTURBATION)
    axes.annotate("sharp", (-1.6, 0.07), ha="center")
    axes.annotate("flat", (1.3, 0.22), ha="center")
    axes.set(xlabel="weights", ylabel="loss", yticks=[], xticks=[], ylim=(0.0, 1.75))
    axes.legend(loc="upper center", frameon=False)


def steps(axes: Axes) -> None:
    """Draw the passes of a step, on a line of time."""
    perturb, step = ("", 0.04, PERTURBATION), ("", 0.15, STEP)
    parts = {
        "LoRA": [("pass at B", 1.0, FORWARD), step],
        "EFMLoRA": [("pass at B + average of E", 1.0, FORWARD), perturb, step],
        "FMLoRA": [("pass at B", 1.0, FORWARD), perturb, ("pass at B + E", 1.0, FORWARD), step],
    }
    for place, bars in enumerate(parts.values()):
        start = 0.0
        for text, width, color in bars:
            axes.barh(place, width, left=start, color=color, edgecolor="white", height=0.6)
            axes.text(start + width / 2, place, text, ha="center", va="center", color="white", fontsize=8)
            start += width
    axes.barh(0, 0, color=PERTURBATION, label="E from the gradients")
    axes.barh(0, 0, color=STEP, label="optimizer step on A and B")
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set(xlabel="time of a step", xticks=[], ylim=(2.5, -1.1))
    axes.legend(loc="upper right", frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw both."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    objective(left)
    steps(right)
    figure.savefig("docs/results/method.png", dpi=130)


if __name__ == "__main__":
    main()
