"""Pairs of one shape, stacked so that their algebra takes a few batched calls for any number of pairs."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora import functional
from lightning_flatlora.functional import Ascent, Estimator, NormScope
from lightning_flatlora.pairs.lora_pair import LoRAPair, rows_of
from lightning_flatlora.sharding import Sharding, matrix_shape

# Most elements of a stacked factor on a CPU: 2 MB of float32, which fits its caches. A larger factor is computed by
# itself, without a copy. Stacks exist to save calls, and from this size on a call's work takes far longer than its
# overhead.
LARGEST_STACK = 2**19
# The limit on devices where launching a kernel costs more than a large allocation: 32 MB of float32.
LARGEST_STACK_ON_ACCELERATORS = 2**23


class PairState(NamedTuple):
    """The state of a pair that survives a new search of the model, and goes into a checkpoint.

    Attributes:
        E: its perturbation, stored like B: (n, r), (n, r * experts) with experts, or transposed (r, n).
        has_average: whether the moving average of each of its products has begun, booleans, shape (experts,).
        scaling: s of the pair when E was computed, float64 on the CPU, shape ().
    """

    E: Tensor
    has_average: Tensor
    scaling: Tensor


class PairStack:
    """Pairs of one shape, dtype and device, with their perturbations.

    A pair is one product s B A, or one for each of its experts, which are all treated like separate layers.

    Attributes:
        pairs: the pairs, L of them.
        A, B: every pair's factors, in this order.
        learned_A: every A; none if they are fixed, since nobody then clears a gradient that they may get.
        E: their perturbations, stored like B, shape (L, n, r * experts) or transposed (L, r, n), float32 or wider.
        has_average: whether the moving average of each product has begun, booleans, shape (L, experts).

    Args:
        pairs: grouped by :func:`stacked`.
        estimator: which gradients the ascent uses; "projected" for pairs whose A has no gradient.
        sharding: how the ranks share the factors.
    """

    def __init__(self, pairs: list[LoRAPair], estimator: Estimator, sharding: Sharding) -> None:
        first = pairs[0]
        dtype, device = torch.promote_types(first.B.dtype, torch.float32), first.B.device
        self.pairs = pairs
        self._estimator = estimator
        self.sharding = sharding
        # Listed once: a loop over pairs takes as long as the products of small factors.
        self.A, self._A_rows = [pair.A for pair in pairs], [pair.A_rows for pair in pairs]
        self.learned_A = [] if first.A_is_fixed else self.A
        self.B, self._B_rows = [pair.B for pair in pairs], [pair.B_rows for pair in pairs]
        self.experts, self.is_transposed = first.experts, first.is_transposed
        scaling = torch.tensor([pair.scaling for pair in pairs], dtype=dtype, device=device)
        self.scaling = scaling.repeat_interleave(self.experts)
        rows, columns = matrix_shape(sharding.shape(first.B))
        rows = rows if first.B_rows is None else len(first.B_rows)
        self.E = torch.zeros(len(pairs), rows, columns, dtype=dtype, device=device)
        self.has_average = torch.zeros(len(pairs), self.experts, dtype=torch.bool, device=device)
        # These differ from the pairs' own only between loading a state and the next search.
        self.scaling_of_E = torch.tensor([pair.scaling for pair in pairs], dtype=torch.float64)

    def states(self) -> Iterator[tuple[LoRAPair, PairState]]:
        """Yield every pair with its state, whose tensors are views."""
        for pair, E, has_average, scaling in zip(self.pairs, self.E, self.has_average, self.scaling_of_E, strict=True):
            yield pair, PairState(E, has_average, scaling)

    def average(self, fresh_E: Tensor, with_gradient: Tensor, finite: Tensor, beta: float) -> None:
        """Move E towards a fresh one, see :meth:`Perturbation.average`."""
        is_taken = with_gradient.view_as(self.has_average) & finite.to(fresh_E.device)
        weight = torch.full_like(self.has_average, beta, dtype=fresh_E.dtype)
        # The first E is taken whole: there is no average yet, and (1 - beta) 0 + beta E would be too short.
        weight = torch.where(self.has_average, weight, 1.0) * is_taken
        by_expert = (*self.E.shape[:2], -1, self.experts)
        self.E.view(by_expert).lerp_(fresh_E.view(by_expert), weight[:, None, None])
        self.has_average |= is_taken

    def ascent(self, at_perturbed: bool) -> Ascent:
        """Compute the ascent of the stack's products, L * experts of them, from the gradients that the pairs hold."""
        A, grad_B = self._stacked(of_B=False), self._stacked(of_B=True, gradients=True)
        if not self.reads_grad_A:
            return functional.ascent_projected(A, grad_B, self.scaling)
        B = self._stacked(of_B=True, at_perturbed=at_perturbed)
        # The gradient of an A with a frozen B has no weight in ascent_average, since it agrees with no gradient of B.
        return functional.ascent_average(A, B, self._stacked(of_B=False, gradients=True), grad_B, self.scaling)

    @property
    def reads_grad_A(self) -> bool:
        """Whether the ascent reads the gradients of A: not by choice, nor if none is trained, as in LoRA-FA.

        An A that is frozen now may still have its gradient, if its turn within a step is over.
        """
        learns = any(A.requires_grad for A in self.learned_A) or any(self.sharding.have_gradients(self.learned_A))
        return learns and self._estimator == "average"

    def _stacked(self, of_B: bool, *, gradients: bool = False, at_perturbed: bool = False) -> Tensor:
        """Stack A or B of every product, or their gradients, (L * experts, rows, columns); one may be a view."""
        parameters, rows = (self.B, self._B_rows) if of_B else (self.A, self._A_rows)
        if rows[0] is None:
            stacked = self.sharding.stack(parameters, gradients=gradients)
        else:
            # Several pairs may be rows of one parameter, which is gathered only once.
            distinct = list(dict.fromkeys(parameters))
            whole = dict(zip(distinct, self.sharding.stack(distinct, gradients=gradients), strict=True))
            stacked = torch.stack([rows_of(whole[each], part) for each, part in zip(parameters, rows, strict=True)])
        stacked = stacked.to(self.E.dtype)
        if at_perturbed:
            # Rounded as the layer reads it, so that these are the factors at which the gradients were taken.
            stacked = (stacked + self.E).to(parameters[0].dtype).to(self.E.dtype)
        return self._split(stacked, of_B)

    def _split(self, stacked: Tensor, of_B: bool) -> Tensor:
        """Split a tensor of the shape of the pairs' A or B into one matrix for each product."""
        if self.is_transposed:
            return stacked.mT
        if self.experts == 1:
            return stacked
        if not of_B:
            return stacked.reshape(len(stacked) * self.experts, -1, stacked.shape[2])
        columns = stacked.reshape(len(stacked), -1, self.experts)
        return _transposed(columns).view(len(columns) * self.experts, stacked.shape[1], -1)

    def joined(self, products: Tensor) -> Tensor:
        """Join matrices that :meth:`_split` gives for B into the shape of E."""
        if self.is_transposed:
            return _transposed(products)
        if self.experts == 1:
            return products
        return _transposed(products.reshape(len(self.pairs), self.experts, -1)).view_as(self.E)


def _transposed(matrices: Tensor) -> Tensor:
    """Return matrices (L, rows, columns) as contiguous ones (L, columns, rows)."""
    transposed = matrices.new_empty(len(matrices), matrices.shape[2], matrices.shape[1])
    # One by one, which PyTorch copies in blocks: on a CPU five times as fast as all at once.
    for one, other in zip(transposed, matrices, strict=True):
        one.copy_(other.t())
    return transposed


def stacked(pairs: Iterable[LoRAPair], estimator: Estimator, sharding: Sharding) -> list[PairStack]:
    """Stack pairs by shapes, dtypes, device and whether A is trained, in parts of at most the largest stack."""
    groups: dict[Any, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        A, B = pair.A, pair.B
        rows = [part and len(part) for part in (pair.A_rows, pair.B_rows)]
        # A pair with a frozen A has a different ascent, without A's gradient.
        # Tensor parallelism splits one of the factors, by rows or by columns.
        placements = [getattr(factor, "placements", None) for factor in (A, B)]
        layout = (sharding.shape(A), sharding.shape(B), pair.experts, pair.is_transposed, *placements)
        key = (*layout, A.dtype, B.dtype, B.device, pair.learns_A, pair.A_is_fixed, *rows)
        groups[key].append(pair)
    stacks = []
    for (A_shape, B_shape, *_), group in groups.items():
        largest = LARGEST_STACK if group[0].B.device.type == "cpu" else LARGEST_STACK_ON_ACCELERATORS
        size = max(1, largest // max(A_shape.numel(), B_shape.numel()))
        for start in range(0, len(group), size):
            stacks.append(PairStack(group[start : start + size], estimator, sharding))
    if stacks and stacks[0].E.device.type == "cpu":
        # Freeing this larger block lets glibc keep the stacks' memory from one step to the next. Otherwise it returns
        # it in each step and faults every page in again, which takes a quarter of E's time with small layers.
        torch.empty(2**24, dtype=torch.uint8)
    return stacks


class FreshPerturbation(NamedTuple):
    """The E of one gradient.

    Attributes:
        stacks: one tensor for each stack of pairs, of its E's shape; zeros where ``finite`` is false.
        finite: whether every gradient was finite, a boolean on the device, shape ().
        is_zero: rho was the number 0, so E is known to be zero without asking the device.
        with_gradient: for each stack, which of its products, (L * experts,), had a gradient that is not zero.
    """

    stacks: list[Tensor]
    finite: Tensor
    is_zero: bool
    with_gradient: list[Tensor]


def fresh_perturbation(
    stacks: list[PairStack], norm_scope: NormScope, rho: float | Tensor, at_perturbed: bool, others: list[nn.Parameter]
) -> FreshPerturbation:
    """Take E from gradients (Eqs. 10-15), see :meth:`Perturbation.ascend`; autograd and autocast must be off.

    ``others`` are parameters whose gradients must be finite too.
    """
    # Every entry of a gradient enters a norm, so the norms show whether the pairs' gradients are finite, except for the
    # gradients of A that a projected estimate does not read.
    values, gradients, unread = [], [], list(others)
    for stack in stacks:
        values += stack.A
        gradients += stack.B
        if stack.reads_grad_A:
            values += stack.B
            gradients += stack.A
        else:
            unread += stack.learned_A
    # The stacks may be on several devices.
    sharding, device = stacks[0].sharding, stacks[0].E.device
    with sharding.fetched(values, gradients, unread):
        ascents = [stack.ascent(at_perturbed) for stack in stacks]
        finite = sharding.all_finite(unread, device)
    norms = [ascent.squared_norm for ascent in ascents]
    with_gradient = [norm > 0 for norm in norms]
    # Not float32 for all, in which the squares of large float64 gradients would be infinite.
    dtype = reduce(torch.promote_types, [norm.dtype for norm in norms])
    total = torch.stack([norm.sum().to(device, dtype) for norm in norms]).sum()
    finite = finite & torch.isfinite(total)
    if norm_scope == "global":
        norms = [total.to(norm.device, norm.dtype).expand_as(norm) for norm in norms]
    fresh = []
    for stack, ascent, norm in zip(stacks, ascents, norms, strict=True):
        scale = functional.perturbation_scale(norm, rho)[:, None, None]
        fresh.append(stack.joined(ascent.direction.mul_(scale).masked_fill_(~finite.to(norm.device), 0.0)))
    # Not if rho is a tensor, for which the host would have to wait.
    is_zero = not isinstance(rho, Tensor) and rho == 0
    return FreshPerturbation(fresh, finite, is_zero, with_gradient)
