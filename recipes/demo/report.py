"""The demo's table and its picture: the loss around the weights, and the validation loss against the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.demo.run import ARMS, DISTANCES, RATES, WITH_DROPOUT
from recipes.demo.training import EFMLORA, LORA
from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate, estimate, with_error, with_interval
from recipes.studies.tables import aligned

_SHOWN_RATE = RATES[-1]  # the highest, at which plain LoRA overfits most
_COLOURS = {LORA: "#4477aa", WITH_DROPOUT: "#aa3377", EFMLORA: "#ee7733"}


def table(rows: Sequence[Row]) -> str:
    """Show validation loss of each method at each rate, and how much it rises around the weights."""
    settings = rows[0]["settings"]
    lines = [["method", *(f"loss, rate {rate:g}" for rate in RATES), "rise"]]
    for arm in ARMS:
        cells = [with_error(estimate(_losses(rows, arm, rate)), ".3f") for rate in RATES]
        rise = [around[-1] for around in _rises(rows, arm)]
        lines.append([arm, *cells, with_error(estimate(rise), ".2f")])
    notes = [
        f"mean ± standard error over {len(_of(rows, LORA, RATES[0]))} seeds; validation part; {settings['shots']} "
        f"examples of each subject of exam questions to train on, {settings['steps']} steps",
        f"rise: of the loss at distance {DISTANCES[-1]:g} along the steepest direction that B can express, rate "
        f"{_SHOWN_RATE:g}",
    ]
    return "\n".join(["Validation loss in nats", aligned(lines), "", *notes, ""])


def sentences(rows: Sequence[Row]) -> str:
    """Tell EFMLoRA's differences to both others at the highest rate, and what they do not show."""
    lines = [f"EFMLoRA's differences at the rate {_SHOWN_RATE:g}, in nats (95 % intervals, paired by seed):"]
    own_rises = [around[-1] for around in _rises(rows, EFMLORA)]
    for arm in (LORA, WITH_DROPOUT):
        loss = _paired(_losses(rows, EFMLORA, _SHOWN_RATE), _losses(rows, arm, _SHOWN_RATE))
        rise = _paired(own_rises, [around[-1] for around in _rises(rows, arm)])
        lines.append(f"to {arm}: validation loss {with_interval(loss)}, rise {with_interval(rise)}")
    lines.append("This demo does not show that EFMLoRA is more accurate than LoRA with a tuned dropout.")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw both sides of what changes, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    around, rates = figure.subplots(1, 2)
    for arm in ARMS:
        style = {"label": arm, "color": _COLOURS[arm], "capsize": 3}
        by_distance = list(zip(*_rises(rows, arm), strict=True))
        _curve(around, DISTANCES, [estimate(values) for values in by_distance], style)
        _curve(rates, RATES, [estimate(_losses(rows, arm, rate)) for rate in RATES], {**style, "marker": "o"})
    around.set(
        title=f"Loss around the trained weights, rate {_SHOWN_RATE:g}",
        xlabel="distance from the weights, along the steepest direction of B",
        ylabel="rise of the validation loss (nats)",
    )
    rates.set(title="Loss against the learning rate", xlabel="learning rate", ylabel="validation loss (nats)")
    rates.set_xscale("log")
    rates.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    rates.set_xticks([], minor=True)
    rates.legend()
    figure.savefig(path, dpi=130)


def _curve(axes: Any, x: Sequence[float], found: Sequence[Estimate], style: dict[str, Any]) -> None:
    errors = [each.error if each.values > 1 else 0.0 for each in found]
    axes.errorbar(x, [each.mean for each in found], yerr=errors, **style)


def _of(rows: Sequence[Row], arm: str, rate: float) -> list[Row]:
    """Return those rows by seed."""
    found = [row for row in rows if row["arm"] == arm and row["rate"] == rate]
    return sorted(found, key=lambda row: int(row["seed"]))


def _losses(rows: Sequence[Row], arm: str, rate: float) -> list[float]:
    return [row["validation_loss"] for row in _of(rows, arm, rate)]


def _rises(rows: Sequence[Row], arm: str) -> list[list[float]]:
    """Return the rises above the loss at the weights, by seed and distance."""
    rises = []
    for row in _of(rows, arm, _SHOWN_RATE):
        here = row["losses_around"][0]
        rises.append([loss - here for loss in row["losses_around"]])
    return rises


def _paired(own: Sequence[float], other: Sequence[float]) -> Estimate:
    return estimate([mine - its for mine, its in zip(own, other, strict=True)])
