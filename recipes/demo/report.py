"""The demo's tables and its picture: the validation loss against the learning rate, and around the weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.demo.run import ARMS, DISTANCES, EFMLORA, LORA, RATES, WITH_DROPOUT
from recipes.studies.colours import COLOURS
from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, with_error, with_interval
from recipes.studies.tables import aligned

_COLOURS = {LORA: COLOURS["LoRA"], WITH_DROPOUT: COLOURS["LoRA, dropout 0.9"], EFMLORA: COLOURS["EFMLoRA"]}


def tables(rows: Sequence[Row]) -> str:
    """Show the validation loss of each method at each rate, and compare the methods at their own best rates."""
    settings = rows[0]["settings"]
    every = [["method", *(f"rate {rate:g}" for rate in RATES)]]
    best = [["method", "best rate", "loss", "EFMLoRA's loss - its", "rise", "EFMLoRA's rise - its"]]
    for arm in ARMS:
        every.append([arm, *(with_error(estimate(_losses(rows, arm, rate)), ".3f") for rate in RATES)])
        best.append(_at_its_best(rows, arm))
    parts = [
        f"Validation loss in nats, mean ± standard error over {len(_of(rows, LORA, RATES[0]))} seeds; "
        f"{settings['shots']} examples of each subject of exam questions to train on, {settings['steps']} steps",
        aligned(every),
        "",
        "Each method at its best rate, chosen on these seeds; differences with 95 % intervals, paired by seed",
        aligned(best),
        f"rise: of the loss at distance {DISTANCES[-1]:g} along the steepest direction that B can express",
        "",
    ]
    return "\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss against the rate, and around the weights trained at each method's best rate, as a PNG."""
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    rates, around = figure.subplots(1, 2)
    for arm in ARMS:
        best = _best_rate(rows, arm)
        _curve(rates, arm, RATES, [_losses(rows, arm, rate) for rate in RATES])
        _curve(around, f"{arm}\nrate {best:g}", DISTANCES, list(zip(*_rises(rows, arm, best), strict=True)))
    rates.set(xlabel="learning rate", ylabel="validation loss (nats)", xscale="log")
    rates.set_title("Best losses are alike, EFMLoRA's at a higher rate")
    rates.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    rates.set_xticks([], minor=True)
    around.set_xlabel("distance from the weights, in B's steepest direction")
    around.set_ylabel("rise of the validation loss (nats)")
    around.set_title("At the best rates, EFMLoRA is flattest")
    figure.savefig(path, dpi=130)


def _curve(axes: Any, label: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> None:
    """Draw means and standard errors of values at some places, with the label at the end of the line."""
    colour = _COLOURS[label.partition("\n")[0]]
    found = [estimate(each) for each in values]
    means = [each.mean for each in found]
    axes.errorbar(x, means, yerr=[each.error for each in found], color=colour, capsize=3, marker=".")
    beside = {"xytext": (8, 0), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(label, (x[-1], means[-1]), va="center", color=colour, **beside)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _at_its_best(rows: Sequence[Row], arm: str) -> list[str]:
    """Return a line of the second table."""
    rate, own = _best_rate(rows, arm), _best_rate(rows, EFMLORA)
    losses, rises = _losses(rows, arm, rate), _last_rises(rows, arm, rate)
    line = [arm, f"{rate:g}", with_error(estimate(losses), ".3f"), "", with_error(estimate(rises), ".2f"), ""]
    if arm != EFMLORA:
        line[3] = with_interval(_paired(_losses(rows, EFMLORA, own), losses), 3)
        line[5] = with_interval(_paired(_last_rises(rows, EFMLORA, own), rises))
    return line


def _of(rows: Sequence[Row], arm: str, rate: float) -> list[Row]:
    """Return those rows by seed."""
    found = [row for row in rows if row["arm"] == arm and row["rate"] == rate]
    return sorted(found, key=lambda row: int(row["seed"]))


def _losses(rows: Sequence[Row], arm: str, rate: float) -> list[float]:
    return [row["validation_loss"] for row in _of(rows, arm, rate)]


def _best_rate(rows: Sequence[Row], arm: str) -> float:
    """Return the rate with the lowest mean loss."""
    means = {rate: estimate(_losses(rows, arm, rate)).mean for rate in RATES}
    # A rate at which a run has diverged has no mean.
    return min(RATES, key=lambda rate: math.inf if math.isnan(means[rate]) else means[rate])


def _rises(rows: Sequence[Row], arm: str, rate: float) -> list[list[float]]:
    """Return the rises above the loss at the weights, by seed and distance."""
    rises = []
    for row in _of(rows, arm, rate):
        here = row["losses_around"][0]
        rises.append([loss - here for loss in row["losses_around"]])
    return rises


def _last_rises(rows: Sequence[Row], arm: str, rate: float) -> list[float]:
    return [around[-1] for around in _rises(rows, arm, rate)]


def _paired(own: Sequence[float], other: Sequence[float]) -> Estimate:
    return estimate([mine - its for mine, its in zip(own, other, strict=True)])
