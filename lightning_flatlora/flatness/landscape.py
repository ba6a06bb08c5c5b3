"""The loss along lines and on planes through the weights.

A direction D holds one (n, r) matrix for each pair; a step x along it moves every adapted weight by ``x s D A``. All
directions have ``||s D A||_F = 1`` over all pairs, so x is a distance in the weights' units for any adapter. Finding a
direction takes no pass, and each loss one forward pass. Several losses are returned in float64 on the CPU.
:func:`loss_along_line` has an example.
"""

from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lightning_flatlora.flatness.losses import Loss, LossGradient, value
from lightning_flatlora.flatness.sharpness import fresh_perturbation, overlaps, read
from lightning_flatlora.full_weight.output_terms import adapted_layers
from lightning_flatlora.functional import pseudo_inverse_roots
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import AnyRef, perturbed

Direction = list[Tensor]
"""One (n, r) matrix for each pair, in the order of the pairs."""


def adversarial_direction(perturbation: Perturbation, at: LossGradient) -> Direction:
    r"""Compute the direction of SAM's perturbation E of a gradient (Eqs. 10-15).

    .. math:: D = E / \|s E A\|_F

    Args:
        perturbation: which pairs, and how E is made.
        at: the loss and its gradient at the clean weights; if the gradient is zero, so is the direction.
    """
    return normalized(perturbation.pairs, read(perturbation, fresh_perturbation(perturbation, 1.0, at)))


def random_direction(pairs: Sequence[LoRAPair], seed: int) -> Direction:
    r"""Draw a direction uniformly from those that B can express: on the sphere in full weight space.

    .. math:: D = \tfrac1s Z R,\quad R^\top R = (A A^\top)^+,\quad Z_{ij} \sim \mathcal N(0, 1)

    then scaled to length one. The rows of R A are orthonormal (some are 0 if A's are dependent), so the draw does not
    depend on how the update is factored into B and A.

    Example:
        >>> A, B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
        >>> (direction,) = random_direction([LoRAPair("layer", A, B, scaling=2.0)], seed=0)
        >>> torch.allclose((2.0 * direction @ A).norm(), torch.tensor(1.0))
        True
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
        direction.append(pair.as_stored((normal.to(root) @ root).to(wide)))
    return normalized(pairs, direction)


def orthogonal_direction(pairs: Sequence[LoRAPair], direction: Direction, to: Direction) -> Direction:
    """Compute the part of a direction that is orthogonal to another one in full weight space, scaled to length one.

    Example:
        >>> A, B = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(1, 2))
        >>> pair = LoRAPair("layer", A, B, scaling=1.0)
        >>> orthogonal_direction([pair], [torch.tensor([[3.0, 4.0]])], to=[torch.tensor([[1.0, 0.0]])])
        [tensor([[0., 1.]])]
    """
    along = overlaps(pairs, direction, to).sum()
    return normalized(pairs, [own - along.to(own) * other for own, other in zip(direction, to, strict=True)])


def normalized(pairs: Sequence[LoRAPair], direction: Direction) -> Direction:
    """Scale a direction to ``||s D A||_F = 1`` over all pairs; zeros stay zeros."""
    norm = overlaps(pairs, direction, direction).sum().clamp_min(0).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return [part * scale.to(part) for part in direction]


def loss_at(loss: Loss, pairs: Sequence[LoRAPair], *steps: tuple[float, Direction]) -> Tensor:
    """Compute the loss, shape (), after steps from the weights: each a length in the weights' units and a direction."""
    moves: dict[AnyRef, Tensor] = {}
    for index, pair in enumerate(pairs):
        E = torch.stack([x * direction[index] for x, direction in steps]).sum(0)
        moves.update(dict.fromkeys(pair.readers, E.reshape(len(E), *pair.B.shape[1:])))
    with perturbed(moves):
        return value(loss)


def loss_along_line(loss: Loss, pairs: Sequence[LoRAPair], direction: Direction, steps: Tensor) -> Tensor:
    """Compute the loss along a line through the weights.

    Args:
        loss: mean loss of fixed batches.
        pairs: the model's pairs.
        direction: direction of the line.
        steps: distances from the weights, in the weights' units, shape (points,), which is also the result's.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> from lightning_flatlora.flatness import loss_gradient, trained_factors
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> loss, pairs = lambda: model(torch.ones(5, 4)).square().mean(), find_pairs(model).pairs
        >>> direction = adversarial_direction(Perturbation(pairs), loss_gradient(loss, trained_factors(pairs)))
        >>> below, here, above = loss_along_line(loss, pairs, direction, torch.tensor([-0.01, 0.0, 0.01]))
        >>> bool(below < above), bool(here == loss_at(loss, pairs, (0.0, direction)))
        (True, True)
        >>> other = orthogonal_direction(pairs, random_direction(pairs, seed=0), to=direction)
        >>> steps = torch.linspace(-1, 1, 5)
        >>> loss_on_plane(loss, pairs, across=(other, steps[:3]), along=(direction, steps)).shape
        torch.Size([3, 5])
    """
    return torch.stack([loss_at(loss, pairs, (step, direction)) for step in steps.tolist()]).cpu().double()


def loss_on_plane(
    loss: Loss, pairs: Sequence[LoRAPair], across: tuple[Direction, Tensor], along: tuple[Direction, Tensor]
) -> Tensor:
    """Compute the loss on a plane through the weights.

    Args:
        loss: mean loss of fixed batches.
        pairs: the model's pairs.
        across: a direction, and the distances along it for the rows of the result, shape (rows,).
        along: a direction, and the distances along it for the columns, shape (columns,).
    """
    rows = []
    for y in across[1].tolist():
        rows.append(torch.stack([loss_at(loss, pairs, (y, across[0]), (x, along[0])) for x in along[1].tolist()]))
    return torch.stack(rows).cpu().double()


def base_norm(model: nn.Module, pairs: Sequence[LoRAPair]) -> float:
    """Compute ``||W0||_F`` over all layers that the pairs adapt, a yardstick for distances in the weights.

    Args:
        model: with peft's layers; quantized bases are dequantized one by one.
        pairs: the model's pairs.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora import find_pairs
        >>> base = torch.nn.Linear(4, 4)
        >>> _ = torch.nn.init.eye_(base.weight)
        >>> model = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))
        >>> base_norm(model, find_pairs(model).pairs)
        2.0
    """
    norms = []
    for _, layer, _ in adapted_layers(model, pairs):
        norms.append(torch.linalg.vector_norm(dequantize_module_weight(layer.get_base_layer()).detach().double()).cpu())
    return float(torch.linalg.vector_norm(torch.stack(norms)))
