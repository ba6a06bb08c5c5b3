"""What is measured by samples: a mean, and how far it may be off."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over samples and its standard error, shape () each, in the samples' unit."""

    mean: Tensor
    standard_error: Tensor


def estimate(samples: Sequence[Tensor]) -> Estimate:
    r"""The mean of independent samples and its standard error, both in float64.

    .. math:: \bar x = \tfrac1k \sum_i x_i, \qquad \mathrm{se} = \sqrt{\tfrac{1}{k(k-1)} \sum_i (x_i - \bar x)^2}

    Args:
        samples: k of them, at least one, shape () each. The standard error of a single one is nan.

    Raises:
        ValueError: there is no sample.

    Example:
        >>> estimate(list(torch.tensor([1.0, 2.0, 3.0])))
        Estimate(mean=tensor(2., dtype=torch.float64), standard_error=tensor(0.5774, dtype=torch.float64))
    """
    if not samples:
        raise ValueError("a mean needs at least one sample: let samples be 1 or more")
    values = torch.stack(list(samples)).detach().double()
    spread = values.std(correction=1) if len(values) > 1 else values.new_tensor(torch.nan)
    return Estimate(values.mean(), spread / len(values) ** 0.5)
