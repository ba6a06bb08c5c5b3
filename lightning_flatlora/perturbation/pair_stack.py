"""Pairs of one shape, stacked so that their algebra is a few batched calls, whatever their number."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.functional import (
    Ascent,
    Estimator,
    NormScope,
    ascent_average,
    ascent_projected,
    perturbation_scale,
)
from lightning_flatlora.pairs.lora_pair import LoRAPair, rows_of
from lightning_flatlora.perturbation.pair_state import PairState
from lightning_flatlora.sharding import Sharding, matrix_shape

LARGEST_STACK = 2**18
"""Elements of a stacked factor in one computation on a CPU: 1 MB of float32, which its caches hold.

A larger factor is computed by itself, without a copy. Stacks exist to save calls, and from this size on the work of a
call takes far longer than making it.
"""

LARGEST_STACK_ON_ACCELERATORS = 2**23
"""The same limit where launching a kernel costs more than a large allocation: 32 MB of float32."""


class _Factor:
    """A or B of a stack's pairs, listed once: a walk over pairs takes as long as the products of small factors.

    Args:
        parameters: of each pair.
        rows: those of each pair in its parameter, all None or none of them.
        dtype: of the computation.
    """

    def __init__(
        self, parameters: list[nn.Parameter], rows: list[range | None], dtype: torch.dtype, sharding: Sharding
    ) -> None:
        self._of_pairs, self._rows, self._dtype, self._sharding = parameters, rows, dtype, sharding
        self._distinct = parameters
        if rows[0] is not None:  # several pairs may be rows of one parameter, which is gathered once
            self._distinct = list(dict.fromkeys(parameters))
        places = {parameter: place for place, parameter in enumerate(self._distinct)}
        self._places = [places[parameter] for parameter in parameters]

    def stacked(self, *, gradients: bool = False) -> Tensor:
        """The factor of every pair, or its gradient, shape (L, rows, columns); a single one may be a view."""
        stacked = self._sharding.stack(self._distinct, gradients=gradients)
        if self._rows[0] is not None:
            parts = []
            for place, rows in zip(self._places, self._rows, strict=True):
                parts.append(rows_of(stacked[place], rows))
            stacked = torch.stack(parts)
        return stacked.to(self._dtype)

    def have_gradients(self) -> list[bool]:
        """Which pairs have a gradient of this factor."""
        return self._sharding.have_gradients(self._of_pairs)


class PairStack:
    """Pairs of one shape, dtype and device, with their perturbations.

    Attributes:
        pairs: the pairs, L of them.
        E: their perturbations, shape (L, n, r), float32 or wider.
        has_average: whether the moving average of each has begun, booleans, shape (L,).

    Args:
        pairs: as :func:`stackable` groups them.
        estimator: which gradients the ascent is taken from; for a pair whose A has none it is "projected".
        sharding: how the ranks share the factors.
    """

    def __init__(self, pairs: list[LoRAPair], estimator: Estimator, sharding: Sharding) -> None:
        B = pairs[0].B
        dtype = torch.promote_types(B.dtype, torch.float32)
        self.pairs = pairs
        self._estimator = estimator
        self._sharding = sharding
        self._A = _Factor([pair.A for pair in pairs], [pair.A_rows for pair in pairs], dtype, sharding)
        self._B = _Factor([pair.B for pair in pairs], [pair.B_rows for pair in pairs], dtype, sharding)
        # Of which pairs the last ascent did not read the gradient of A.
        self._projected_rows = [True] * len(pairs)
        self.scaling = torch.tensor([pair.scaling for pair in pairs], dtype=dtype, device=B.device)
        n, r = matrix_shape(sharding.shape(B))
        if pairs[0].B_rows is not None:
            n = len(pairs[0].B_rows)
        self.E = torch.zeros(len(pairs), n, r, dtype=dtype, device=B.device)
        self.has_average = torch.zeros(len(pairs), dtype=torch.bool, device=B.device)
        # Other than the pairs' own only between loading a state and the next search.
        self.scalings_of_E = [pair.scaling for pair in pairs]
        # Which B had a gradient in the last ascent, shape (L,), None where all had one; and the same for the host.
        self._with_gradient: Tensor | None = None
        self._rows_with_gradient = [True] * len(pairs)

    def state(self, i: int) -> PairState:
        """What is to be kept of a pair; its tensors are views."""
        return PairState(self.E[i], self.has_average[i], self.scalings_of_E[i])

    def put(self, i: int, state: PairState) -> None:
        """Let a pair continue from a kept state."""
        self.E[i].copy_(state.E)
        self.has_average[i] = state.has_average
        self.scalings_of_E[i] = state.scaling

    def rescale(self, i: int) -> None:
        """Let s E of a pair be what it was under the scaling with which E was computed."""
        scaling = self.pairs[i].scaling
        if self.scalings_of_E[i] != scaling:
            self.E[i].mul_(self.scalings_of_E[i] / scaling)
            self.scalings_of_E[i] = scaling

    def average(self, fresh_E: Tensor, finite: Tensor, beta: float) -> None:
        """Move E towards a fresh one, see :meth:`Perturbation.average`."""
        is_taken = finite.to(fresh_E.device)
        if self._with_gradient is not None:  # a pair without a gradient keeps its E
            is_taken = is_taken & self._with_gradient
        weight = torch.full((len(fresh_E),), beta, dtype=fresh_E.dtype, device=fresh_E.device)
        # The first E is taken whole: there is no average yet to move, and (1 - beta) 0 + beta E would be too short.
        weight = torch.where(self.has_average, weight, 1.0) * is_taken
        self.E.lerp_(fresh_E, weight[:, None, None])
        self.has_average |= is_taken

    def ascent(self, at_perturbed: bool) -> Ascent:
        """The batched ascent of the stack's pairs, from the gradients that they hold."""
        self._note_gradients()
        self._projected_rows = self._without_gradient_of_A()
        A, grad_B = self._A.stacked(), self._B.stacked(gradients=True)
        if all(self._projected_rows):
            return ascent_projected(A, grad_B, self.scaling)
        averaged = self._averaged(A, grad_B, at_perturbed)
        if not any(self._projected_rows):
            return averaged
        projected = ascent_projected(A, grad_B, self.scaling)
        is_projected = self._row_mask(self._projected_rows)
        return Ascent(
            torch.where(is_projected[:, None, None], projected.direction, averaged.direction),
            torch.where(is_projected, projected.squared_norm, averaged.squared_norm),
        )

    @property
    def unread_A(self) -> list[nn.Parameter]:
        """The A whose gradients the last ascent did not read."""
        return [pair.A for pair, is_projected in zip(self.pairs, self._projected_rows, strict=True) if is_projected]

    def _without_gradient_of_A(self) -> list[bool]:
        """Which pairs are projected, since nothing else was asked for, or because their A is frozen, as in LoRA-FA.

        Looked at in each ascent: an adapter whose turn comes inside a step, or in the middle of an accumulation window,
        was frozen when the pairs were stacked, and one whose turn is over is frozen now and still has its gradients.
        """
        if self._estimator == "projected":
            return [True] * len(self.pairs)
        have = self._A.have_gradients()
        return [not (has or pair.learns_A) for pair, has in zip(self.pairs, have, strict=True)]

    def _averaged(self, A: Tensor, grad_B: Tensor, at_perturbed: bool) -> Ascent:
        B = self._B.stacked()
        if at_perturbed:
            # Rounded as the layer reads it, so that the factors are those at which the gradients were taken.
            B = (B + self.E).to(self.pairs[0].B.dtype).to(self.E.dtype)
        # A trained A beside a frozen B would enter the norm, although its B can't be perturbed.
        grad_A = self._A.stacked(gradients=True)
        if self._with_gradient is not None:
            # Not in place: a stack of one pair is a view of the user's own gradient.
            grad_A = grad_A.masked_fill(~self._with_gradient[:, None, None], 0.0)
        return ascent_average(A, B, grad_A, grad_B, self.scaling)

    def _note_gradients(self) -> None:
        """Note which B have a gradient; the mask is filled on the device when it changes, so no copy is waited for."""
        rows = self._B.have_gradients()
        if rows != self._rows_with_gradient:
            self._rows_with_gradient = rows
            self._with_gradient = None if all(rows) else self._row_mask(rows)

    def _row_mask(self, rows: list[bool]) -> Tensor:
        """Booleans on the device, shape (L,)."""
        mask = torch.ones_like(self.has_average)
        # Filled there, since the host would wait for a copy.
        for row, is_true in zip(mask, rows, strict=True):
            if not is_true:
                row.zero_()
        return mask


def stackable(pairs: Iterable[LoRAPair], sharding: Sharding) -> list[list[LoRAPair]]:
    """Pairs grouped by shapes, dtypes and device, in parts of at most the largest stack."""
    groups: dict[Any, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        A, B = pair.A, pair.B
        rows = [part and len(part) for part in (pair.A_rows, pair.B_rows)]
        key = (sharding.shape(A), sharding.shape(B), A.dtype, B.dtype, B.device, *rows)
        groups[key].append(pair)
    parts = []
    for (A_shape, B_shape, *_), group in groups.items():
        largest = LARGEST_STACK if group[0].B.device.type == "cpu" else LARGEST_STACK_ON_ACCELERATORS
        size = max(1, largest // max(A_shape.numel(), B_shape.numel()))
        for start in range(0, len(group), size):
            parts.append(group[start : start + size])
    return parts


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
    sharding: Sharding,
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
    finite = sharding.all_finite(unread, device) & torch.isfinite(_total(norms, device, dtype))
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
