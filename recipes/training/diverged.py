"""A model that has diverged is never right."""

import torch
from torch import Tensor, nn


def wrong_where_nan(scores_nc: Tensor, label_n: Tensor) -> Tensor:
    """Return scores in which a row that holds a NaN is sure of a wrong class, since argmax would take the first one.

    Infinite scores stay as they are: they still have an order.

    Args:
        scores_nc: of each class, the higher the better, (N, C); C is 2 or more.
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
