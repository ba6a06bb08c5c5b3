"""Several instruments at one point, for few passes; measures of the factors, compared with dense float64 matrices."""

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
    condition_number,
    cosine,
    ema_sharpness,
    gradient_identity_residual,
    inner_product,
    lora_sharpness,
    measure,
    realized_radius,
    sam_sharpness,
)
from lightning_flatlora.flatness.sharpness import read
from lightning_flatlora.full_weight import WeightNoise


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
    """The docstring's numbers of passes; only the first pass at each point is followed by a backward pass."""
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
    """The loss itself is finite; with E = 0 it would seem to rise by 0."""
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


L, N, M, R = 3, 7, 5, 2


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_inner_products_are_those_of_the_dense_perturbations() -> None:
    E1, E2, A, s = random(L, N, R), random(L, N, R), random(L, R, M), torch.tensor([0.5, 2.0, 3.0])
    dense1, dense2 = (s[:, None, None] * (E @ A) for E in (E1, E2))
    expected = (dense1 * dense2).sum((1, 2))
    norms = torch.linalg.matrix_norm(dense1), torch.linalg.matrix_norm(dense2)
    torch.testing.assert_close(inner_product(E1, E2, A, s), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(realized_radius(E1, A, s), norms[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(cosine(E1, E2, A), expected / norms[0] / norms[1], rtol=1e-12, atol=0)


def test_the_cosine_with_a_zero_perturbation_is_zero() -> None:
    E, A = random(L, N, R), random(L, R, M)
    assert (cosine(E, torch.zeros_like(E), A) == 0).all()
    torch.testing.assert_close(cosine(E, -3 * E, A), -torch.ones(L, dtype=torch.float64))


def test_balancedness_changes_with_the_split_of_one_product() -> None:
    A, B = random(L, R, M), random(L, N, R)
    expected = torch.stack([(b.pow(2).sum() - a.pow(2).sum()) / 2 for a, b in zip(A, B, strict=True)])
    torch.testing.assert_close(balancedness(A, B), expected)
    torch.testing.assert_close(balancedness(A / 2, 2 * B), 2 * B.square().sum((1, 2)) - A.square().sum((1, 2)) / 8)


@pytest.mark.parametrize("shape", [(L, R, M), (L, N, R)])
def test_condition_numbers_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    X = random(*shape)
    torch.testing.assert_close(condition_number(X), torch.linalg.cond(X))


def test_conditions_as_bad_as_adams_first_update_are_seen() -> None:
    """A Gram matrix would lose them, as its condition number is the square, which exceeds float64."""
    column = random(N, 1)
    nearly_parallel = torch.cat([column, column + 1e-10 * random(N, 1)], 1)
    assert 1e9 < float(condition_number(nearly_parallel)) < 1e11
    assert condition_number(torch.zeros(N, R)) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rank_that_is_full_by_rounding_alone_is_not_full(dtype: torch.dtype) -> None:
    deficient = (random(64, 2) @ random(2, 4)).to(dtype)
    assert torch.linalg.svdvals(deficient.double())[-1] > 0
    assert condition_number(deficient) == torch.inf
    assert condition_number(deficient.mT) == torch.inf
    wide = random(4, 1024).to(dtype)
    torch.testing.assert_close(condition_number(wide), torch.linalg.cond(wide.double()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_condition_cosine_or_residual(value: float) -> None:
    E, A, B, G = random(L, N, R), random(L, R, M), random(L, N, R), random(L, N, M)
    broken, grad_A, grad_B = E.clone(), B.mT @ G, G @ A.mT
    broken[1, 2, 1] = grad_B[1, 2, 1] = value
    expected = [False, True, False]
    assert condition_number(broken).isnan().tolist() == expected
    for other in (E, broken, torch.zeros_like(E)):
        assert cosine(broken, other, A).isnan().tolist() == expected
        assert cosine(other, broken, A).isnan().tolist() == expected
    assert gradient_identity_residual(A, B, grad_A, grad_B).isnan().tolist() == expected


def test_the_gradients_of_one_product_agree_and_others_do_not() -> None:
    A, B, G = random(L, R, M), random(L, N, R), random(L, N, M)
    grad_A, grad_B = B.mT @ G, G @ A.mT
    assert (gradient_identity_residual(A, B, grad_A, grad_B) < 1e-15).all()
    assert (gradient_identity_residual(A, B, random(L, R, M), grad_B) > 0.1).all()
    assert (gradient_identity_residual(A, B, -grad_A, grad_B) > 1 - 1e-12).all()
    assert (gradient_identity_residual(A, torch.zeros_like(B), 0 * grad_A, grad_B) == 0).all()
