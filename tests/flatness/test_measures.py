"""Several instruments at one point: the same numbers as one by one, for fewer passes."""

from typing import Any

import pytest
import torch
from quadratics import RHO, Quadratic, average_of
from torch import Tensor

from lightning_flatlora import Perturbation
from lightning_flatlora.flatness import (
    DEFAULT_MEASURES,
    MEASURES,
    Point,
    balancedness,
    ema_sharpness,
    lora_sharpness,
    measure,
    realized_radius,
    sam_sharpness,
)
from lightning_flatlora.flatness.sharpness import read
from lightning_flatlora.weight_noise import WeightNoise


def point_of(quadratic: Quadratic, loss: Any = None, **settings: Any) -> Point:
    perturbation = average_of(quadratic.pairs, quadratic.loss)
    noise = WeightNoise(quadratic.model)
    return Point(loss or quadratic.loss, perturbation, RHO, average=perturbation, noise=noise, **settings)


@pytest.mark.parametrize(
    ("measures", "passes"),
    [
        (["balancedness", "condition"], 0),
        (["sharpness"], 2),
        (["sharpness", "lora_sharpness"], 3),
        (["sharpness", "lora_sharpness", "ema", "radius", "gradient_residual"], 5),
        (DEFAULT_MEASURES, 3),
        (["expected_sharpness"], 9),
        (["hessian_trace"], 8),
    ],
    ids=str,
)
def test_forward_passes(measures: list[str], passes: int) -> None:
    """Those of the docstring: of these, the first at each point is followed by a backward pass."""
    quadratic, calls = Quadratic(), []

    def loss() -> Tensor:
        calls.append(None)
        return quadratic.loss()

    measure(point_of(quadratic, loss), measures)
    assert len(calls) == passes


def test_they_are_the_numbers_of_each_instrument() -> None:
    quadratic = Quadratic()
    point = point_of(quadratic)
    found, pairs = measure(point, MEASURES, per_layer=True), quadratic.pairs
    sam = sam_sharpness(quadratic.loss, point.perturbation, RHO)
    ema = ema_sharpness(quadratic.loss, point.perturbation, RHO)
    assert found["loss"] == sam.loss
    assert found["sharpness"] == sam.sharpness
    assert found["lora_sharpness"] == lora_sharpness(quadratic.loss, pairs, RHO).sharpness
    assert (found["ema_sharpness"], found["ema_gap"], found["ema_cosine"]) == (ema.ema, ema.gap, ema.cosine)
    balances = [balancedness(pair.A.detach(), pair.B.detach()) for pair in pairs]
    assert [found[f"balancedness/{pair.name}"] for pair in pairs] == balances
    torch.testing.assert_close(found["balancedness"], torch.stack(balances).mean())
    assert found["condition_B"] == sorted(found[f"condition_B/{pair.name}"] for pair in pairs)[1]
    assert found["gradient_residual"] < 1e-12
    assert all(value.shape == () and value.isfinite() for value in found.values())


def test_the_radius_is_that_of_the_whole_perturbation_relative_to_rho() -> None:
    quadratic = Quadratic()
    perturbation = Perturbation(quadratic.pairs, "projected")
    found = measure(Point(quadratic.loss, perturbation, RHO), ["radius"], per_layer=True)
    assert abs(found["radius"] - 1) < 1e-3  # "projected" reaches rho up to the damping
    quadratic.loss().backward()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    for pair, E in zip(quadratic.pairs, read(perturbation), strict=True):
        expected = realized_radius(E, pair.A.detach(), pair.scaling) / RHO
        torch.testing.assert_close(found[f"radius/{pair.name}"], expected, rtol=1e-9, atol=0)


def test_frozen_factors_are_left_alone() -> None:
    quadratic = Quadratic()
    for pair in quadratic.pairs:
        pair.A.requires_grad_(False)
    point = Point(quadratic.loss, Perturbation(quadratic.pairs), RHO)
    found = measure(point, ["sharpness", "lora_sharpness", "gradient_residual", "top_eigenvalue"])
    assert found["gradient_residual"] == 0
    assert found["sharpness"] > 0
    assert found["lora_sharpness"] > 0


def test_what_needs_a_gradient_is_nan_where_that_is_not_finite() -> None:
    """Of a loss that is finite itself, whose rise along E = 0 would be 0."""
    quadratic = Quadratic()
    point = point_of(quadratic, lambda: quadratic.loss() + (0 * quadratic.loss()).sqrt())
    found = measure(point, MEASURES, per_layer=True)
    without = {"loss", "ema_sharpness", "expected_sharpness", "expected_sharpness_error"}
    of_factors = ("balancedness", "condition")
    for name, value in found.items():
        assert value.isnan() != (name in without or name.startswith(of_factors)), name


def test_what_an_instrument_needs_is_asked_for() -> None:
    quadratic = Quadratic()
    point = Point(quadratic.loss, Perturbation(quadratic.pairs), RHO)
    with pytest.raises(ValueError, match=r"'ema' needs Point\.average"):
        measure(point, ["ema"])
    with pytest.raises(ValueError, match=r"'expected_sharpness' needs Point\.noise"):
        measure(point, ["expected_sharpness"])
