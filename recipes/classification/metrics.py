"""torchmetrics' metrics, by their configured names."""

from collections.abc import Callable, Sequence
from functools import partial

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef


def new_metrics(names: Sequence[str] | None, classes: int) -> dict[str, Metric]:
    """Return metrics that compare predicted with true labels; the first one decides on the best checkpoint.

    "f1" is that of class 1 if there are two classes, and otherwise the mean over classes.

    Args:
        names: as configured; None means accuracy for classes, Pearson's and Spearman's correlation for numbers.
        classes: number of classes; 0 for numbers to predict.

    Raises:
        MisconfigurationException: a name is unknown or of the other kind, or none is given.

    Example:
        >>> from torch import tensor
        >>> round(new_metrics(["f1"], 2)["f1"](tensor([1, 1, 0]), tensor([1, 0, 0])).item(), 2)
        0.67
    """
    known: dict[str, Callable[[], Metric]]
    if classes:
        known = {
            "accuracy": partial(MulticlassAccuracy, classes, average="micro"),
            "f1": BinaryF1Score if classes == 2 else partial(MulticlassF1Score, classes),
            "matthews": partial(MulticlassMatthewsCorrCoef, classes),
        }
    else:
        known = {"pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}
    if names is None:
        names = ["accuracy"] if classes else list(known)
    if not names or not set(names) <= set(known):
        raise MisconfigurationException(
            f"metrics={list(names)} must be some of {list(known)} for {'classes' if classes else 'a regression'}"
        )
    return {name: known[name]() for name in names}
