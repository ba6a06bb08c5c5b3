"""The demo's table and its picture."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.shared.methods import COLOURS
from recipes.shared.tables import Table


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One row a method: held-out accuracy and loss, train loss, sharpness, cost relative to LoRA.

    Args:
        results: each method's result.json.
    """
    settings = next(iter(results.values()))["settings"]
    title = f"{settings['dataset']}, {settings['steps']} steps of {settings['batch_size']}, {settings['precision']}"
    columns = ("method", "held-out accuracy", "held-out loss", "train loss", "sharpness", "step x LoRA", "peak MiB")
    rows = []
    base = results.get("LoRA", {}).get("median_step_seconds")
    for method, result in results.items():
        seconds = result["median_step_seconds"]
        cells = [
            method,
            f"{result['test_accuracy']:.3f}" if result["test_accuracy"] is not None else "-",
            f"{result['test_loss']:.3f}",
            f"{result['train_loss']:.3f}",
            f"{result['sharpness']:.4f}",
            f"{seconds / base:.2f}" if seconds and base else "-",
            f"{result['peak_memory_mib']:.0f}",
        ]
        rows.append(cells)
    return Table(title, columns, rows)


def plot(results: dict[str, dict[str, Any]], folder: Path, path: Path) -> None:
    """Training loss by step, and held-out accuracy against sharpness, as a PNG.

    Args:
        results: each method's result.json.
        folder: that holds one folder for each method, with Lightning's metrics.csv.
        path: of the picture.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for method in results:
        steps, losses = _curve(folder / method / "metrics.csv")
        if steps:
            curves.plot(steps, losses, color=COLOURS[method], alpha=0.25, linewidth=1)
            curves.plot(steps, _smoothed(losses), color=COLOURS[method], label=method)
    curves.set(xlabel="optimizer step", ylabel="training loss (nats per answer token)", title="training")
    note = "thin: each step; thick: running mean.\nEFMLoRA's is at B + Ê, where its pass runs"
    curves.text(0.98, 0.98, note, transform=curves.transAxes, ha="right", va="top", fontsize=8)
    curves.legend(loc="center right")
    accuracies = [result["test_accuracy"] or 0.0 for result in results.values()]
    drawn = bars.bar(list(results), accuracies, color=[COLOURS[method] for method in results])
    bars.bar_label(
        drawn,
        labels=[f"{a:.2f}\nsharpness {r['sharpness']:.3f}" for a, r in zip(accuracies, results.values(), strict=True)],
        fontsize=8,
    )
    bars.set(ylabel="held-out accuracy", title="after training", ylim=(0, max(accuracies) * 1.25 or 1))
    figure.savefig(path, dpi=130)


def _curve(path: Path) -> tuple[list[int], list[float]]:
    if not path.exists():
        return [], []
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train_loss")]
    return [int(row["step"]) for row in rows], [float(row["train_loss"]) for row in rows]


def _smoothed(values: list[float], decay: float = 0.5) -> list[float]:
    """An exponential running mean that starts at the first value."""
    mean, out = values[0], []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        out.append(mean)
    return out
