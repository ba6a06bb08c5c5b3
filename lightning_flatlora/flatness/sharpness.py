"""The rise of the loss around the weights: along the gradient, along the average Ê, and under noise.

The rise is in the loss's unit (nats for a cross-entropy). The passes given below are those without a known gradient.
Results that depend on a gradient are nan if it is not finite.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.flatness.curvature import estimate
from lightning_flatlora.flatness.factors import cosine_of, inner_product
from lightning_flatlora.flatness.losses import Loss, LossGradient, loss_gradient, value
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.functional import joint_ascent
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of, trained_factors
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation
from lightning_flatlora.perturbed_read import clean, shown
from lightning_flatlora.schedules import is_size


class Sharpness(NamedTuple):
    """The loss at the clean weights and at perturbed ones, shape ().

    Attributes:
        loss: L(w).
        perturbed: L(w + E), or its mean under noise.
        standard_error: that of a mean under noise; 0 for one E.
    """

    loss: Tensor
    perturbed: Tensor
    standard_error: Tensor = torch.zeros(())

    @property
    def sharpness(self) -> Tensor:
        """The rise of the loss."""
        return self.perturbed - self.loss


class EMASharpness(NamedTuple):
    """The losses that Theorem 2 compares.

    Attributes:
        loss: L(w), shape ().
        at_average: L(w + Ê).
        at_fresh: L(w + E).
        cosine: between Ê and E over all pairs in full weight space, in [-1, 1].
    """

    loss: Tensor
    at_average: Tensor
    at_fresh: Tensor
    cosine: Tensor

    @property
    def ema(self) -> Tensor:
        """S_EMA = L(w + Ê) - L(w)."""
        return self.at_average - self.loss

    @property
    def sam(self) -> Tensor:
        """S_SAM = L(w + E) - L(w)."""
        return self.at_fresh - self.loss

    @property
    def gap(self) -> Tensor:
        """|S_EMA - S_SAM|."""
        return (self.at_average - self.at_fresh).abs()


def sam_sharpness(loss: Loss, perturbation: Perturbation, rho: float, at: LossGradient | None = None) -> Sharpness:
    r"""Measure SAM sharpness in full weight space: the rise along FMLoRA's perturbation (Eqs. 8, 10-15).

    .. math:: S_{SAM} = L(W_0 + s (B + E) A) - L(W_0 + s B A), \qquad \|s E A\|_F \le \rho

    Three passes: forward, backward, forward.

    Args:
        loss: mean loss of fixed batches.
        perturbation: gives pairs, estimator and norm scope; its kept E does not change.
        rho: radius of the ball in full weight space, in the weights' units.
        at: the loss and its gradient at the clean weights, if already known.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> loss = lambda: model(torch.ones(5, 4)).square().mean()
        >>> perturbation = Perturbation(find_pairs(model).pairs)
        >>> bool(sam_sharpness(loss, perturbation, rho=0.05).sharpness > 0)
        True
        >>> bool(lora_sharpness(loss, perturbation.pairs, rho=0.05).sharpness > 0)
        True
        >>> result = ema_sharpness(loss, perturbation, rho=0.05)  # no step yet: Ê = 0
        >>> float(result.ema), bool(result.gap == result.sam), float(result.cosine)
        (0.0, True, 0.0)
    """
    with clean(readers_of(perturbation.pairs)):
        at = at or loss_gradient(loss, trained_factors(perturbation.pairs))
        return Sharpness(at.loss, _at_fresh(loss, perturbation, fresh_perturbation(perturbation, rho, at)))


def lora_sharpness(loss: Loss, pairs: Sequence[LoRAPair], rho: float, at: LossGradient | None = None) -> Sharpness:
    r"""Measure sharpness in LoRA's own space: the rise along the joint gradient of A and B (Eq. 7, "LoRA-SAM").

    .. math:: L(A + E_A, B + E_B) - L(A, B), \qquad (E_A, E_B) = \rho\,\frac{(G_A, G_B)}{\|(G_A, G_B)\|}

    The norm is over all pairs. The value depends on how the update is factored: it is different for (B M, M⁻¹ A). Three
    passes: forward, backward, forward. :func:`sam_sharpness` has an example.

    Args:
        loss: mean loss of fixed batches.
        pairs: the model's pairs; frozen factors are not moved.
        rho: radius of the ball in (A, B), in the factors' units, >= 0.
        at: the loss and its gradient at the clean weights, if already known.
    """
    if not is_size(rho):
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    with clean(readers_of(pairs)):
        at = at or loss_gradient(loss, trained_factors(pairs))
        # A gradient that is not finite has no ascent; the loss at E = 0 would look flat.
        finite = torch.nn.utils.get_total_norm(at.gradients, torch.inf).isfinite()
        with moved(at.parameters, joint_ascent(at.gradients, rho)):
            return Sharpness(at.loss, torch.where(finite, value(loss), torch.nan))


def critical_sharpness(loss: Loss, at: LossGradient) -> Tensor:
    r"""Estimate the curvature along the gradient from the smallest step down it that no longer lowers the loss.

    .. math:: \lambda_c = \frac{2}{\eta_c}, \qquad \eta_c = \min\{\eta > 0 : L(w - \eta g) \ge L(w)\}

    For a quadratic loss this is the Rayleigh quotient :math:`g^\top H g / \lVert g \rVert^2`. The step is bracketed by
    factors of 2, each with a forward pass; three more passes determine it to 5 %. At rates above η_c the loss rises.

    Args:
        loss: mean loss of fixed batches.
        at: the loss and its gradient at the weights.

    Returns:
        Shape (); 0 if the loss falls however long the step is, nan if the gradient is zero or not finite.

    Source: Kalra et al., arXiv 2601.16979, who measure along an optimizer's update instead of the gradient.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> loss = lambda: (torch.tensor([3.0, 3.0]) * w.square()).sum() / 2
        >>> bool(abs(critical_sharpness(loss, loss_gradient(loss, [w])) - 3) < 0.15)
        True
    """
    norm = float(nn.utils.get_total_norm(at.gradients))
    if not 0 < norm < math.inf:
        return torch.tensor(math.nan)

    def is_lower(step: float) -> bool:
        with moved(at.parameters, joint_ascent(at.gradients, -step * norm)):
            return bool(value(loss) < at.loss)

    # Polyak's step, half of η_c if the least loss is 0.
    step = float(at.loss.abs()) / norm**2 or 1.0
    was_lower = is_lower(step)
    factor = 2.0 if was_lower else 0.5
    for _ in range(60):
        step *= factor
        if is_lower(step) != was_lower:
            break
    else:
        return torch.tensor(0.0 if was_lower else math.nan)
    below, above = sorted([step, step / factor])
    for _ in range(3):
        middle = math.sqrt(below * above)
        below, above = (middle, above) if is_lower(middle) else (below, middle)
    return torch.tensor(2 / math.sqrt(below * above))


def ema_sharpness(loss: Loss, perturbation: Perturbation, rho: float, at: LossGradient | None = None) -> EMASharpness:
    r"""Compare the rise along EFMLoRA's average Ê with that along the fresh perturbation E (Theorem 2, Figure 3).

    .. math:: |S_{EMA} - S_{SAM}| = |L(w + \hat E) - L(w + E)|

    Four passes: forward, backward, two forwards. :func:`sam_sharpness` has an example.

    Args:
        loss: mean loss of fixed batches.
        perturbation: keeps Ê, as ``EFMLoRA.perturbation`` does, and determines how E is computed.
        rho: radius of the fresh E; for the theorem, the radius of Ê.
        at: the loss and its gradient at the clean weights, if already known.
    """
    with clean(readers_of(perturbation.pairs)):
        at = at or loss_gradient(loss, trained_factors(perturbation.pairs))
        fresh = fresh_perturbation(perturbation, rho, at)
        pairs, average, E = perturbation.pairs, read(perturbation), read(perturbation, fresh)
        product = overlaps(pairs, average, E).sum()
        similarity = cosine_of(product, overlaps(pairs, average, average).sum(), overlaps(pairs, E, E).sum())
        similarity = similarity.where(fresh.finite, torch.nan)
        with perturbation.applied():
            at_average = value(loss)
        return EMASharpness(at.loss, at_average, _at_fresh(loss, perturbation, fresh), similarity)


def expected_sharpness(loss: Loss, noise: WeightNoise, sigma: float, samples: int = 8, seed: int = 0) -> Sharpness:
    r"""Estimate the mean rise of the loss under Gaussian noise on all weights (Flat-LoRA, arXiv 2409.14396, Eq. 7).

    .. math:: \mathbb E_\varepsilon\,[L(W + \varepsilon)] - L(W), \qquad
        \varepsilon_{ij} \sim \mathcal N\!\left(0, \tfrac{\sigma^2}{m} \|W_{i\cdot}\|^2\right)

    It takes 1 + samples forward passes.

    Args:
        loss: mean loss of fixed batches.
        noise: the model's noise; sample k draws from ``seed + k``.
        sigma: size of the noise relative to the rows' norms, without a unit.
        samples: draws, at least 2 for a standard error.
        seed: random seed of the first draw.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora.full_weight import WeightNoise
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> loss = lambda: model(torch.eye(4)).square().mean()  # convex: noise can only raise it on average
        >>> bool(expected_sharpness(loss, WeightNoise(model), sigma=0.5, samples=64).sharpness > 0)
        True
    """
    at_weights = value(loss)
    at_noise = []
    # Every rank uses these seeds, so that all measure at the same weights.
    for sample in range(samples):
        with noise.applied(sigma, seed + sample):
            at_noise.append(value(loss))
    mean, standard_error = estimate(at_noise)
    return Sharpness(at_weights, mean.to(at_weights.dtype), standard_error)


def fresh_perturbation(perturbation: Perturbation, rho: float, at: LossGradient) -> FreshPerturbation:
    """Compute E of a gradient taken at the clean weights (Eqs. 10-15); ``perturbation`` does not change.

    Args:
        perturbation: the pairs, and how E is computed from their gradients.
        rho: radius of the ball in full weight space, in the weights' units.
        at: from :func:`loss_gradient`, for at least the pairs' trained factors.

    Returns:
        E of all pairs, as :meth:`~lightning_flatlora.Perturbation.applied` takes it in ``stacks``.
    """
    with at.as_grad():
        return perturbation.ascend(rho, at_perturbed=False)


def read(perturbation: Perturbation, fresh: FreshPerturbation | None = None) -> list[Tensor]:
    """Return E of every pair, fresh or kept, in the order of the pairs, each a matrix of B's shape."""
    with clean(readers_of(perturbation.pairs)), perturbation.applied(fresh and fresh.stacks):
        seen = [shown(pair.readers[0]) for pair in perturbation.pairs]
    return [E.flatten(1) for E in seen if E is not None]


def overlaps(pairs: Sequence[LoRAPair], E1: Sequence[Tensor], E2: Sequence[Tensor]) -> Tensor:
    """Compute inner products of two perturbations in full weight space: squared weights' units, shape (pairs,)."""
    products = []
    for pair, one, other in zip(pairs, E1, E2, strict=True):
        (_, one), (_, other) = pair.products(pair.A, one), pair.products(pair.A, other)
        products.append(inner_product(one, other, pair.matrices()[0], pair.scaling).sum())
    return torch.stack([product.to(products[0].device) for product in products])


def _at_fresh(loss: Loss, perturbation: Perturbation, fresh: FreshPerturbation) -> Tensor:
    """Compute L(w + E); nan if E is unknown, rather than the loss at E = 0."""
    with perturbation.applied(fresh.stacks):
        return torch.where(fresh.finite, value(loss), torch.nan)


@contextmanager
def moved(parameters: Sequence[nn.Parameter], moves: Sequence[Tensor]) -> Iterator[None]:
    """Move parameters to w + move inside; afterwards, even after an error, restore exactly their old values.

    Args:
        parameters: moved in place, so that other holders of their memory, such as a compiled graph, see the move.
        moves: one per parameter, of its shape and of any floating dtype.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> with moved([weight], [torch.ones(2)]):
        ...     inside = weight.tolist()
        >>> inside, weight.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    stored = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, move in zip(parameters, moves, strict=True):
            # By .data, which autograd does not count as a new version, since the old values are restored.
            parameter.data.add_(move)
        # An autocast around this block caches low-precision copies of the old values.
        torch.clear_autocast_cache()
        yield
    finally:
        for parameter, value_before in zip(parameters, stored, strict=True):
            parameter.data.copy_(value_before)
        torch.clear_autocast_cache()
