"""E of all pairs from the gradients that they hold: one norm over the stacks, or one for each layer."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.distributed import Layout
from lightning_flatlora.functional import NormScope, perturbation_scale
from lightning_flatlora.perturbation.pair_stack import PairStack


class FreshPerturbation(NamedTuple):
    """E as one gradient gives it.

    Attributes:
        stacks: one (L, n, r) tensor for each stack of layers of one shape; zeros where ``finite`` is false.
        finite: whether every gradient was finite, a boolean on the device, shape ().
        is_zero: rho was the number 0, so E is known to be zero without asking the device.
    """

    stacks: list[Tensor]
    finite: Tensor
    is_zero: bool


def fresh_perturbation(
    stacks: Sequence[PairStack],
    norm_scope: NormScope,
    rho: float | Tensor,
    at_perturbed: bool,
    also_finite: Iterable[nn.Parameter],
    layout: Layout,
) -> FreshPerturbation:
    """Take E from gradients (Eqs. 10-15), see :meth:`Perturbation.ascend`; autograd and autocast must be off."""
    ascents = [stack.ascent(at_perturbed) for stack in stacks]
    norms = [ascent.squared_norm for ascent in ascents]
    # Every entry of a gradient enters a norm, so the norms answer for the pairs, except for the gradients of A that a
    # projected estimate does not read.
    unread = list(also_finite)
    for stack in stacks:
        unread += stack.unread_A
    # Not float32 for all, in which the squares of large float64 gradients are infinite.
    dtype = reduce(torch.promote_types, [norm.dtype for norm in norms])
    device = stacks[0].E.device
    finite = layout.all_finite(unread, device) & torch.isfinite(_total(norms, device, dtype))
    if norm_scope == "global":
        total = _total(norms, norms[0].device, norms[0].dtype)
        norms = [total.to(norm.device, norm.dtype).expand_as(norm) for norm in norms]
    fresh = []
    for ascent, norm in zip(ascents, norms, strict=True):
        scale = perturbation_scale(norm, rho)[:, None, None]
        fresh.append(ascent.direction.mul_(scale).masked_fill_(~finite.to(norm.device), 0.0))
    # Not of a tensor, which the host would have to wait for.
    is_zero = not isinstance(rho, Tensor) and rho == 0
    return FreshPerturbation(fresh, finite, is_zero)


def _total(norms: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The sum over all layers of all stacks, which may be on several devices, shape ()."""
    sums = [norm.sum().to(device, dtype) for norm in norms]
    return torch.stack(sums).sum()
