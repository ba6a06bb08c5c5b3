"""The instruments' numbers of one adapter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatlora.flatness import (
    Loss,
    Slope,
    balancedness,
    condition_number,
    expected_sharpness,
    fresh_perturbation,
    hessian_trace,
    lora_sharpness,
    sam_sharpness,
    top_eigenvalue,
    trained_factors,
)
from lightning_flatlora.flatness.sharpness import radii, read
from lightning_flatlora.pairs import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.report.options import Options
from lightning_flatlora.weight_noise import WeightNoise

EIGENVALUE_PRODUCTS = 20
"""Hessian-vector products that the largest eigenvalue takes at least; each is three passes."""


LOSS = "loss"
NORM = "norm of the adapted weights ‖W0‖"
RADIUS = "realised radius ‖s E A‖ / rho"


def sam_name(rho: float) -> str:
    """What SAM sharpness is called."""
    return f"SAM sharpness, rho {rho:g}"


class Quantity(NamedTuple):
    """A number with its unit, and its standard error or its range over the layers where it has one.

    Attributes:
        name: what is measured.
        unit: of the number; empty where it has none.
        value: the number, or the median over the layers.
        error: standard error over random draws.
        span: smallest and largest over the layers.
    """

    name: str
    unit: str
    value: float
    error: float | None = None
    span: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Four digits, with the error or the range.

        Example:
            >>> str(Quantity("loss", "nats", 1.23456)), str(Quantity("trace", "", 2.0, error=0.5))
            ('1.235', '2 ± 0.5')
        """
        text = f"{self.value:.4g}"
        if self.error is not None:
            return f"{text} ± {self.error:.2g}"
        return text if self.span is None else f"{text} ({self.span[0]:.4g} to {self.span[1]:.4g})"


def measure_numbers(
    loss: Loss, perturbation: Perturbation, noise: WeightNoise | None, at: Slope, unit: str, options: Options
) -> list[Quantity]:
    """Every number of the report, in its order.

    Args:
        loss: of fixed batches.
        perturbation: of the adapter's pairs.
        noise: on the full weights; None leaves expected sharpness out.
        at: the loss and its gradient at the adapter.
        unit: of the loss.
        options: radii, noise, draws.

    Returns:
        The quantities; see :func:`passes` for the cost.
    """
    pairs = perturbation.pairs
    found = [Quantity(LOSS, unit, float(at.loss))]
    for rho in options.rho:
        found.append(Quantity(sam_name(rho), unit, float(sam_sharpness(loss, perturbation, rho, at).sharpness)))
    for rho in options.rho:
        rise = lora_sharpness(loss, pairs, rho, at).sharpness
        found.append(Quantity(f"LoRA-space sharpness, rho {rho:g}", unit, float(rise)))
    if noise is not None:
        expected = expected_sharpness(loss, noise, options.sigma, options.samples, options.seed)
        name = f"expected sharpness, sigma {options.sigma:g}"
        found.append(Quantity(name, unit, float(expected.sharpness), error=float(expected.standard_error)))
    if options.curvature:
        top = top_eigenvalue(loss, trained_factors(pairs), seed=options.seed)
        trace = hessian_trace(loss, trained_factors(pairs), options.samples, options.seed)
        found.append(Quantity("largest Hessian eigenvalue", f"{unit} / factor²", float(top)))
        found.append(
            Quantity("Hessian trace", f"{unit} / factor²", float(trace.mean), error=float(trace.standard_error))
        )
    return found + _of_factors(pairs) + [_radius(perturbation, at)]


def passes(options: Options) -> int:
    """About how many forward passes' work the numbers are, with two for a backward pass.

    Example:
        >>> from unittest.mock import Mock
        >>> passes(Mock(rho=[0.1], samples=8, curvature=False))
        14
    """
    plain = 3 + 2 * len(options.rho) + 1 + options.samples
    return plain + (3 * (EIGENVALUE_PRODUCTS + options.samples) if options.curvature else 0)


def _of_factors(pairs: Sequence[LoRAPair]) -> list[Quantity]:
    matrices = [(pair.A.detach().flatten(1), pair.B.detach().flatten(1)) for pair in pairs]
    return [
        _over_layers("balancedness", "weight²", [balancedness(A, B) for A, B in matrices]),
        _over_layers("condition number of A", "", [condition_number(A) for A, _ in matrices]),
        _over_layers("condition number of B", "", [condition_number(B) for _, B in matrices]),
    ]


def _radius(perturbation: Perturbation, at: Slope) -> Quantity:
    """The same for every rho, to which E is proportional."""
    realised = radii(perturbation.pairs, read(perturbation, fresh_perturbation(perturbation, 1.0, at)))
    return Quantity(RADIUS, "", float(torch.linalg.vector_norm(realised)))


def _over_layers(name: str, unit: str, values: list[Tensor]) -> Quantity:
    numbers = torch.stack([value.cpu() for value in values])
    return Quantity(name, unit, float(numbers.median()), span=(float(numbers.min()), float(numbers.max())))
