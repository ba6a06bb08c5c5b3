"""The metrics of validation and test, and the confusion matrix as a picture."""

import json
import math
from collections.abc import Mapping, Sequence

import lightning as L
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from recipes.data.files import set_aside, write_whole
from recipes.training.predictions import run_folder

_ANNOTATED = 30  # up to this many classes, cells show numbers
_NAMED = 110  # up to this many classes, the sides show their names


class Evaluation(MetricCollection):
    """Metrics of one evaluation, each counting every example once on any number of ranks.

    ``accuracy``; ``class_accuracy``, the mean of the classes' own accuracies; ``calibration_error``, the expected one
    over 15 bins of confidence; ``confusion``, (classes, classes), how often the row's class was predicted as the
    column's.

    Args:
        classes: number of classes.
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
        """Return the scalars by name and the confusion matrix, and reset them. Every rank must call it."""
        values = self.compute()
        self.reset()
        confusion = values.pop("confusion")
        return values, confusion


def write_evaluation(
    trainer: L.Trainer, name: str, values: Mapping[str, Tensor], confusion: Tensor, classes: Sequence[str]
) -> None:
    """Write ``NAME.json``, the metrics with each class's accuracy, and ``NAME_confusion.png`` into the run's folder.

    Every rank must call it. A fast_dev_run writes no files.
    """
    # On all ranks, before the others return: they agree on it by a broadcast.
    folder = run_folder(trainer)
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    folder.mkdir(parents=True, exist_ok=True)
    scores, picture = folder / f"{name}.json", folder / f"{name}_confusion.png"
    for file in (scores, picture):
        set_aside(file)
    result: dict[str, object] = {key: value.item() for key, value in values.items()}
    shares = confusion / confusion.sum(dim=1, keepdim=True)  # nan for a class without examples
    result["accuracy_of_class"] = class_accuracies(shares.diagonal().tolist(), classes)
    write_whole(scores, json.dumps(result, indent=2) + "\n")
    figure = confusion_figure(confusion, shares.nan_to_num(), classes)
    figure.suptitle(f"{name}: accuracy {values['accuracy']:.3f}")
    figure.savefig(picture, dpi=110)


def confusion_figure(confusion: Tensor, shares: Tensor, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix with a row for the images of each class.

    Args:
        confusion: (classes, classes), counts.
        shares: (classes, classes), as shares of each row.
        classes: names of the classes.
    """
    number = len(classes)
    size = min(4 + 0.25 * number, 22)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", alpha=0.6)  # pale, so that numbers can be read
    axes.set(xlabel="predicted", ylabel="true class")
    if number <= _NAMED:
        names = [name.replace("$", r"\$") for name in classes]  # Matplotlib reads text between two of them as a formula
        axes.set_xticks(range(number), names, rotation=90)
        axes.set_yticks(range(number), names)
    if number <= _ANNOTATED:
        for row, column in confusion.nonzero().tolist():
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=8)
    return figure


def class_accuracies(accuracies: Sequence[float], classes: Sequence[str]) -> dict[str, float]:
    """Return each class's accuracy by its name, without classes that have no example and so an accuracy of nan.

    Example:
        >>> class_accuracies([0.75, float("nan"), 1.0, 0.5], ["cat", "dog", "missile", "missile"])
        {'cat': 0.75, 'missile': 1.0, 'missile (class 3)': 0.5}
    """
    by_name = {}
    for i, (name, accuracy) in enumerate(zip(classes, accuracies, strict=True)):
        if not math.isnan(accuracy):
            by_name[f"{name} (class {i})" if name in by_name else name] = round(accuracy, 6)
    return by_name
