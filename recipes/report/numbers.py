"""The measures of one adapter, as the report's numbers, and all that is kept once its model is deleted."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from pandas import DataFrame

from lightning_flatlora.flatness import MEASURES, Point
from lightning_flatlora.flatness.measures import Values
from recipes.report.landscape import Landscape
from recipes.report.options import Options

UNITS = {"CAUSAL_LM": "nats per token", "SEQ_CLS": "nats per example"}
"""Units of the loss, by the adapter's task."""

LOSS = "loss"
NORM = "norm of the adapted weights ‖W0‖"
RADIUS = "realized radius ‖s E A‖ / rho"


def sam_name(rho: float) -> str:
    """Name the SAM sharpness at a radius."""
    return f"SAM sharpness, rho {rho:g}"


class Quantity(NamedTuple):
    """A number with its unit, and its standard error or its range over the layers if it has one.

    Attributes:
        name: the measure's name.
        unit: the number's; empty if it has none.
        value: the number, or the median over the layers (the lower of the middle two if their number is even).
        error: standard error over random draws.
        span: smallest and largest over the layers.
    """

    name: str
    unit: str
    value: float
    error: float | None = None
    span: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Show four digits, with the error or the range.

        Example:
            >>> str(Quantity("loss", "nats", 1.23456)), str(Quantity("trace", "", 2.0, error=0.5))
            ('1.235', '2 ± 0.5')
        """
        text = f"{self.value:.4g}"
        if self.error is not None:
            return f"{text} ± {self.error:.2g}"
        return text if self.span is None else f"{text} ({self.span[0]:.4g} to {self.span[1]:.4g})"


@dataclass(frozen=True)
class Measured:
    """One adapter's column of the table and line in the pictures.

    Attributes:
        label: its name.
        unit: the loss's.
        about: facts about it, by the heads of a table's columns.
        quantities: the instruments' numbers.
        landscape: losses around it.
        left_out: layers that could not be perturbed, and why.
        rounding: losses and layers from :func:`recipes.report.rounding.measure_rounding`; empty without --bits.
    """

    label: str
    unit: str
    about: dict[str, str]
    quantities: list[Quantity]
    landscape: Landscape
    left_out: list[str]
    rounding: tuple[DataFrame, ...]

    def value(self, name: str) -> float:
        """Return a quantity by its name."""
        return next(quantity.value for quantity in self.quantities if quantity.name == name)


def measure_numbers(point: Point, unit: str, options: Options) -> Iterator[Quantity]:
    """Measure the report's numbers one by one, in its order.

    Args:
        point: the loss around the adapter, with noise.
        unit: the loss's.
        options: which numbers to measure, and radii to use instead of the point's.

    Yields:
        The quantities.
    """

    def take(measure: str, rho: float = 1.0) -> Values:
        return MEASURES[measure](replace(point, rho=rho))

    yield Quantity(LOSS, unit, float(point.gradient.loss))
    for name, measure in (("SAM", "sharpness"), ("LoRA-space", "lora_sharpness")):
        for rho in options.rho:
            yield _quantity(f"{name} sharpness, rho {rho:g}", unit, take(measure, rho), measure)
    name = f"expected sharpness, sigma {options.sigma:g}"
    yield _quantity(name, unit, take("expected_sharpness"), "expected_sharpness")
    if options.curvature:
        curvature = f"{unit} / factor²"
        for name, measure in (("largest Hessian eigenvalue", "top_eigenvalue"), ("Hessian trace", "hessian_trace")):
            yield _quantity(name, curvature, take(measure), measure)
    yield _quantity("balancedness", "weight²", take("balancedness"), "balancedness")
    condition = take("condition")
    yield _quantity("condition number of A", "", condition, "condition_A")
    yield _quantity("condition number of B", "", condition, "condition_B")
    # At rho = 1, which is as good as any: E is proportional to rho.
    yield Quantity(RADIUS, "", float(torch.linalg.vector_norm(take("radius")["radius"])))


def _quantity(name: str, unit: str, values: Values, key: str) -> Quantity:
    """Take one of a measure's values, a number or one for each layer."""
    value, error = values[key].cpu(), values.get(f"{key}_error")
    if value.ndim:
        return Quantity(name, unit, float(value.median()), span=(float(value.min()), float(value.max())))
    return Quantity(name, unit, float(value), None if error is None else float(error))
