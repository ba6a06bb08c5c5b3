"""The measures of one adapter, as the report's numbers."""

from dataclasses import replace
from typing import NamedTuple

import torch

from lightning_flatlora.flatness import MEASURES, Point
from lightning_flatlora.flatness.measures import Values
from recipes.report.options import Options

EIGENVALUE_PRODUCTS = 20
"""Hessian-vector products that the largest eigenvalue takes at least; each is three passes."""

LOSS = "loss"
NORM = "norm of the adapted weights ‖W0‖"
RADIUS = "realized radius ‖s E A‖ / rho"


def sam_name(rho: float) -> str:
    """Name the SAM sharpness at a radius."""
    return f"SAM sharpness, rho {rho:g}"


class Quantity(NamedTuple):
    """A number with its unit, and its standard error or its range over the layers where it has one.

    Attributes:
        name: what is measured.
        unit: of the number; empty where it has none.
        value: the number, or the median over the layers (of an even number the lower of the middle two).
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


def measure_numbers(point: Point, unit: str, options: Options) -> list[Quantity]:
    """Measure every number of the report, in its order.

    Args:
        point: the loss around the adapter; without noise, expected sharpness is left out.
        unit: of the loss.
        options: which numbers, and their radii in place of the point's.

    Returns:
        The quantities; see :func:`passes` for the cost.
    """

    def take(measure: str, rho: float = 1.0) -> Values:
        return MEASURES[measure](replace(point, rho=rho))

    quantities = [Quantity(LOSS, unit, float(point.gradient.loss))]
    for name, measure in (("SAM", "sharpness"), ("LoRA-space", "lora_sharpness")):
        for rho in options.rho:
            quantities.append(_quantity(f"{name} sharpness, rho {rho:g}", unit, take(measure, rho), measure))
    if point.noise is not None:
        name = f"expected sharpness, sigma {options.sigma:g}"
        quantities.append(_quantity(name, unit, take("expected_sharpness"), "expected_sharpness"))
    if options.curvature:
        curvature = f"{unit} / factor²"
        for name, measure in (("largest Hessian eigenvalue", "top_eigenvalue"), ("Hessian trace", "hessian_trace")):
            quantities.append(_quantity(name, curvature, take(measure), measure))
    quantities.append(_quantity("balancedness", "weight²", take("balancedness"), "balancedness"))
    condition = take("condition")
    quantities.append(_quantity("condition number of A", "", condition, "condition_A"))
    quantities.append(_quantity("condition number of B", "", condition, "condition_B"))
    # At rho = 1, which is as good as any: E is proportional to rho.
    quantities.append(Quantity(RADIUS, "", float(torch.linalg.vector_norm(take("radius")["radius"]))))
    return quantities


def passes(options: Options) -> int:
    """Estimate how many forward passes' work the numbers are, with two for a backward pass.

    Example:
        >>> from unittest.mock import Mock
        >>> passes(Mock(rho=[0.1], samples=8, curvature=False))
        14
    """
    # Forward and backward; a forward for each sharpness of either kind; the clean loss and a forward for each draw.
    plain = 3 + 2 * len(options.rho) + 1 + options.samples
    return plain + (3 * (EIGENVALUE_PRODUCTS + options.samples) if options.curvature else 0)


def _quantity(name: str, unit: str, values: Values, key: str) -> Quantity:
    """One of a measure's values, a number or one for each layer."""
    value, error = values[key].cpu(), values.get(f"{key}_error")
    if value.ndim:
        return Quantity(name, unit, float(value.median()), span=(float(value.min()), float(value.max())))
    return Quantity(name, unit, float(value), None if error is None else float(error))
