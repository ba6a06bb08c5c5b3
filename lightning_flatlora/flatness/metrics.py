"""Torchmetrics shells: they declare how what is measured adds up over batches, samples and ranks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Estimate(NamedTuple):
    """A mean over samples and its standard error, shape () each, in the samples' unit."""

    mean: Tensor
    standard_error: Tensor


class MeanWithError(Metric):
    r"""The mean of independent samples and its standard error.

    .. math:: \bar x = \tfrac1k \sum_i x_i, \qquad \mathrm{se} = \sqrt{\tfrac{1}{k(k-1)} \sum_i (x_i - \bar x)^2}

    The standard error of fewer than two samples is nan. Ranks add their samples up when synchronized, so let only ranks
    whose samples differ synchronize it.

    Example:
        >>> samples = MeanWithError()
        >>> samples.update(torch.tensor([1.0, 2.0, 3.0]))
        >>> samples.compute()
        Estimate(mean=tensor(2., dtype=torch.float64), standard_error=tensor(0.5774, dtype=torch.float64))
    """

    is_differentiable = False
    full_state_update = False
    samples: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("samples", default=[], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        """Add samples, of any shape."""
        self.samples.append(value.detach().flatten().double())

    def compute(self) -> Estimate:
        """The mean of all samples so far, and its standard error."""
        # Once it is synchronized, the state is a single tensor.
        values = torch.cat(self.samples) if isinstance(self.samples, list) else self.samples
        spread = values.std(correction=1) if len(values) > 1 else values.new_tensor(torch.nan)
        return Estimate(values.mean(), spread / len(values) ** 0.5)
