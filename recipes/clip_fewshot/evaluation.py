"""What validation and test measure, and the confusion matrix as a picture."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from recipes.shared.files import set_aside
from recipes.shared.predictions import run_folder

_ANNOTATED = 30  # classes up to which the picture has numbers in its cells
_NAMED = 110  # classes up to which it has their names at its sides


class Evaluation(MetricCollection):
    """Metrics of one evaluation, each counting every example once on any number of ranks.

    ``accuracy``; ``class_accuracy``, the mean of the classes' own accuracies; ``calibration_error``, the expected one
    over 15 bins of confidence; ``confusion``, (classes, classes), how often the row's class was taken for the column's.

    Args:
        classes: their number.
    """

    def __init__(self, classes: int) -> None:
        metrics = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "class_accuracy": MulticlassAccuracy(classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(classes, n_bins=15, norm="l1"),
            "confusion": MulticlassConfusionMatrix(classes),
        }
        super().__init__(metrics)  # type: ignore[arg-type]

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """The scalars by name, and the confusion matrix; forgets what it has seen. Every rank has to call it."""
        values = self.compute()
        self.reset()
        confusion = values.pop("confusion")
        return values, confusion


def class_accuracies(confusion: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Each class's accuracy, by name; classes without an example are left out. One name of several gets its number.

    Example:
        >>> import torch
        >>> class_accuracies(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
        {'cat': 0.75}
    """
    totals = confusion.sum(dim=1)
    times = Counter(classes)  # two classes of ImageNet are called "missile"
    accuracies = {}
    for i, name in enumerate(classes):
        if totals[i].item() > 0:
            key = name if times[name] == 1 else f"{name} (class {i})"
            accuracies[key] = round((confusion[i, i] / totals[i]).item(), 6)
    return accuracies


def plot_confusion(confusion: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """Write a confusion matrix as a PNG: each row is a class's images, as shares of them.

    Args:
        confusion: (classes, classes), counts.
        classes: names.
        path: of the picture.
        title: above it.
    """
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    number = len(classes)
    size = min(4 + 0.25 * number, 22)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", alpha=0.6)  # so pale that numbers can be read
    axes.set(xlabel="predicted", ylabel="true class", title=title)
    if number <= _NAMED:
        names = [name.replace("$", r"\$") for name in classes]  # between two of them Matplotlib reads a formula
        axes.set_xticks(range(number), names, rotation=90)
        axes.set_yticks(range(number), names)
    if number <= _ANNOTATED:
        for row, column in confusion.nonzero().tolist():
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_evaluation(
    trainer: L.Trainer, name: str, values: Mapping[str, Tensor], confusion: Tensor, classes: Sequence[str]
) -> None:
    """Write ``NAME.json``, the metrics with each class's accuracy, and ``NAME_confusion.png`` into the run's folder.

    Every rank has to call it. A fast_dev_run leaves no files.
    """
    # On all ranks, before the others return: they agree on it by a broadcast.
    folder = run_folder(trainer)
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    for file in (folder / f"{name}_confusion.png", folder / f"{name}.json"):
        set_aside(file)
    plot_confusion(confusion, classes, folder / f"{name}_confusion.png", f"{name}: accuracy {values['accuracy']:.3f}")
    scalars = {key: value.item() for key, value in values.items()}
    each = class_accuracies(confusion, classes)
    (folder / f"{name}.json").write_text(json.dumps({**scalars, "accuracy_of_class": each}, indent=2) + "\n")
