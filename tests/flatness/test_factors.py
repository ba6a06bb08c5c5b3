"""What the factors say, against dense float64 matrices."""

import pytest
import torch
from torch import Tensor

from lightning_flatlora.flatness import (
    balancedness,
    condition_number,
    cosine,
    gradient_identity_residual,
    inner_product,
    realized_radius,
)

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
    """A Gram matrix would lose them: its condition is the square, beyond float64."""
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
def test_a_factor_that_is_not_finite_has_no_condition(value: float) -> None:
    X = random(L, N, R)
    expected = condition_number(X)
    X[1, 2, 1] = value
    expected[1] = torch.nan
    torch.testing.assert_close(condition_number(X), expected, rtol=0, atol=0, equal_nan=True)
    assert condition_number(X[1]).isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_neither_a_cosine_nor_a_residual(value: float) -> None:
    E, A, B, G = random(L, N, R), random(L, R, M), random(L, N, R), random(L, N, M)
    broken, grad_A, grad_B = E.clone(), B.mT @ G, G @ A.mT
    broken[1, 2, 1] = grad_B[1, 2, 1] = value
    expected = [False, True, False]
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
