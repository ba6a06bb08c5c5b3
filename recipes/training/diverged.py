"""Count a diverged model's predictions as wrong."""

import torch
from torch import Tensor, nn


def wrong_where_nan(scores_nc: Tensor, label_n: Tensor) -> Tensor:
    """Return scores in which a row with a NaN chooses a wrong class, since argmax would take the first NaN.

    Infinite scores stay as they are: they still have an order.

    Args:
        scores_nc: each class's score, the higher the better, (N, C); C is 2 or more.
        label_n: the right classes, (N,).

    Returns:
        The scores, in the same dtype.

    Example:
        >>> scores = torch.tensor([[0.1, 0.9], [float("nan"), 0.5]])
        >>> wrong_where_nan(scores, torch.tensor([1, 0])).argmax(dim=1)
        tensor([1, 1])
    """
    classes = scores_nc.shape[1]
    wrong_nc = nn.functional.one_hot((label_n + 1) % classes, classes).to(scores_nc.dtype)
    return torch.where(scores_nc.isnan().any(dim=1, keepdim=True), wrong_nc, scores_nc)
