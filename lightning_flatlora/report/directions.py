"""Directions in full weight space that B can express, and the loss along them.

A direction D holds one (n, r) matrix for each pair; a step x along it moves every adapted weight by ``x s D A``. All
directions have ``||s D A||_F = 1`` over all pairs, so x is a distance in the weights' units, whatever the adapter.
"""

from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lightning_flatlora import read_through
from lightning_flatlora.flatness import Loss, LossGradient, fresh_perturbation
from lightning_flatlora.flatness.losses import value
from lightning_flatlora.flatness.sharpness import clean, overlap, read
from lightning_flatlora.functional import pseudo_inverse_roots
from lightning_flatlora.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.weight_noise import adapted_layers

Direction = list[Tensor]


def adversarial_direction(perturbation: Perturbation, at: LossGradient) -> Direction:
    r"""SAM's perturbation E of a gradient (Eqs. 10-15), scaled to length one.

    .. math:: D = E / \|s E A\|_F

    Args:
        perturbation: which pairs, and how E is made.
        at: the loss and its gradient at the clean weights.

    Returns:
        One (n, r) matrix for each pair; zeros where the gradient is zero. No pass.
    """
    return normalized(perturbation.pairs, read(perturbation, fresh_perturbation(perturbation, 1.0, at)))


def random_direction(pairs: Sequence[LoRAPair], seed: int) -> Direction:
    r"""A direction drawn evenly from all that B can express: uniform on the sphere in full weight space.

    .. math:: D = \tfrac1s Z R,\quad R^\top R = (A A^\top)^+,\quad Z_{ij} \sim \mathcal N(0, 1)

    then scaled to length one. The rows of R A are orthonormal, or some are 0 where A's are dependent, so the draw does
    not depend on how the update is factored into B and A.

    Args:
        pairs: the layers.
        seed: of the draw, the same on every device; no global generator is used.

    Returns:
        One (n, r) matrix for each pair. No pass.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for pair in pairs:
        A, B = pair.matrices()
        wide = torch.promote_types(B.dtype, torch.float32)
        first_root, _ = pseudo_inverse_roots(A.to(wide))
        root = first_root.mT / pair.scaling
        # On the CPU, so that the draw does not depend on the device.
        normal = torch.randn(B.shape, generator=generator, dtype=torch.float64)
        direction.append((normal.to(root) @ root).to(wide))
    return normalized(pairs, direction)


def orthogonal(pairs: Sequence[LoRAPair], direction: Direction, to: Direction) -> Direction:
    """The part of a direction that is orthogonal in full weight space to a unit direction, scaled to length one."""
    along = overlap(pairs, direction, to)
    return normalized(pairs, [own - along.to(own) * other for own, other in zip(direction, to, strict=True)])


def normalized(pairs: Sequence[LoRAPair], direction: Direction) -> Direction:
    """A direction scaled to ``||s D A||_F = 1`` over all pairs; zeros stay zeros."""
    norm = overlap(pairs, direction, direction).clamp_min(0).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return [part * scale.to(part) for part in direction]


def loss_at(loss: Loss, pairs: Sequence[LoRAPair], *steps: tuple[float, Direction]) -> Tensor:
    """The loss after steps from the weights, each of some length along a direction: shape (), one forward pass."""
    with clean(pairs):
        for index, pair in enumerate(pairs):
            E = torch.stack([x * direction[index] for x, direction in steps]).sum(0)
            for reader in pair.readers:
                read_through.perturb(reader, E.view_as(pair.B))
        return value(loss)


def base_norm(model: nn.Module, pairs: Sequence[LoRAPair]) -> float:
    """``||W0||_F`` of all layers that the pairs adapt, in the weights' units: what steps are to be compared with."""
    norms = []
    for _, layer, _ in adapted_layers(model, pairs):
        weight = dequantize_module_weight(layer.get_base_layer()).detach()
        norms.append(torch.linalg.vector_norm(weight.double()).cpu())
    return float(torch.linalg.vector_norm(torch.stack(norms)))
