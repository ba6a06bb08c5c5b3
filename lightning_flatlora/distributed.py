"""The collectives of the package: all of them are here."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the ranks, in one all-reduce for each dtype and device.

    A missing gradient counts as zero and stays missing only where no process group is running. Every rank must call it
    with the same parameters in the same order.

    Args:
        parameters: the small factors whose gradients travel.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        buckets.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
    for grads in buckets.values():
        flat = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        means = torch.split(flat, [grad.numel() for grad in grads])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))
