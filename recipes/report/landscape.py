"""The loss around an adapter: along lines in the weights, and on a plane through them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatlora.flatness import (
    Loss,
    Point,
    adversarial_direction,
    loss_along_line,
    loss_on_plane,
    orthogonal_direction,
    random_direction,
)
from lightning_flatlora.flatness.losses import value
from lightning_flatlora.full_weight.weight_noise import WeightNoise, derived_seed
from recipes.report.options import Options


@dataclass(frozen=True)
class Landscape:
    """Losses in the loss's unit, float64 on the CPU.

    Attributes:
        steps: distances along the adversarial direction in the weights' units, from -radius to radius, shape (points,).
        adversarial: losses at these, shape (points,).
        shares: distances along random directions, from -sigma to sigma of ``||W0||_F``, shape (points,). At the
            adversarial distances nothing would show, since hardly any part of a random direction matters.
        random: losses at these, shape (directions, points).
        sigmas: sizes of the noise, relative to the rows' norms, from 0 to 2 sigma, shape (sizes,).
        noise: losses under noise on the full weights, shape (directions, sizes).
        surface: losses on a plane, rows along a random direction, columns along the adversarial one, shape
            (points, points); or None.
    """

    steps: Tensor
    adversarial: Tensor
    shares: Tensor
    random: Tensor
    sigmas: Tensor
    noise: Tensor
    surface: Tensor | None


def measure_landscape(point: Point, noise: WeightNoise, norm: float, options: Options) -> Landscape:
    """Measure the losses along all lines and on the plane.

    Args:
        point: the loss around the adapter.
        noise: draws noise on the full weights.
        norm: the weights' norm, from :func:`lightning_flatlora.flatness.base_norm`.
        options: distances, numbers of points and draws, and the seed.

    Returns:
        The :class:`Landscape`, after one forward pass for each of its numbers.
    """
    loss, pairs = point.loss, point.pairs
    adversarial = adversarial_direction(point.perturbation, point.gradient)
    steps = 2 * max(options.rho) * torch.linspace(-1, 1, options.points, dtype=torch.float64)
    shares = torch.linspace(-options.sigma, options.sigma, options.points, dtype=torch.float64)
    # Noise has no sign, so the sizes start at 0, the middle of the other curves.
    sigmas = 2 * shares[options.points // 2 :]
    seeds = [derived_seed(options.seed, index) for index in range(options.directions)]
    surface = None
    if options.surface:
        across = orthogonal_direction(pairs, random_direction(pairs, seeds[0]), adversarial)
        surface = loss_on_plane(loss, pairs, (across, norm * shares), (adversarial, steps))
    return Landscape(
        steps,
        loss_along_line(loss, pairs, adversarial, steps),
        shares,
        torch.stack([loss_along_line(loss, pairs, random_direction(pairs, seed), norm * shares) for seed in seeds]),
        sigmas,
        torch.stack([_noise_curve(loss, noise, seed, sigmas) for seed in seeds]),
        surface,
    )


def _noise_curve(loss: Loss, noise: WeightNoise, seed: int, sigmas: Tensor) -> Tensor:
    losses = []
    for sigma in sigmas.tolist():
        with noise.applied(sigma, seed):
            losses.append(value(loss))
    return torch.stack(losses).cpu().double()
