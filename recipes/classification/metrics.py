"""The metrics of torchmetrics that a configuration names."""

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

OF_CLASSES = ("accuracy", "f1", "matthews")
OF_NUMBERS = ("pearson", "spearman")


def chosen_metrics(names: Sequence[str] | None, classes: int) -> list[str]:
    """The names of the metrics, the first of which decides on the best checkpoint.

    Args:
        names: as configured; None is accuracy for classes, Pearson's and Spearman's correlation for numbers.
        classes: their number; 0 for numbers to predict.

    Raises:
        MisconfigurationException: a name is unknown or of the other kind, or there is none.
    """
    known = OF_CLASSES if classes else OF_NUMBERS
    if names is None:
        return ["accuracy"] if classes else list(OF_NUMBERS)
    if not names or not set(names) <= set(known):
        raise MisconfigurationException(
            f"metrics={list(names)} must be some of {list(known)} for {'classes' if classes else 'a regression'}"
        )
    return list(names)


def new_metric(name: str, classes: int) -> Metric:
    """A metric of predicted against true labels; "f1" is of class 1 of two, and the mean over more classes.

    Example:
        >>> from torch import tensor
        >>> round(new_metric("f1", 2)(tensor([1, 1, 0]), tensor([1, 0, 0])).item(), 2)
        0.67
    """
    if name == "accuracy":
        return MulticlassAccuracy(classes, average="micro")
    if name == "matthews":
        return MulticlassMatthewsCorrCoef(classes)
    if name == "f1":
        return BinaryF1Score() if classes == 2 else MulticlassF1Score(classes)
    return PearsonCorrCoef() if name == "pearson" else SpearmanCorrCoef()
