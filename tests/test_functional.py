"""The closed forms equal the dense definitions, and have the properties that define them (docs/method.md)."""

from collections.abc import Iterator

import pytest
import torch
from reference import ascent
from torch import Tensor, nn

from lightning_flatlora.functional import (
    DAMPING,
    ascent_average,
    ascent_projected,
    damped_inverse_root,
    perturbation_scale,
)

N, M, R, S = 12, 9, 4, 1.7


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and the gradients that a full gradient G gives them."""
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(R, M, generator=generator, dtype=torch.float64)
    B = torch.randn(N, R, generator=generator, dtype=torch.float64)
    G = torch.randn(N, M, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (A, B, S * B.T @ G, S * G @ A.T))  # type: ignore[return-value]


def relative_error(ours: Tensor, expected: Tensor) -> Tensor:
    return (ours - expected).norm() / expected.norm()


def batch(*tensors: Tensor) -> list[Tensor]:
    return [tensor[None] for tensor in tensors]


def scaling(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([S], dtype=dtype)


@pytest.mark.parametrize("estimator", ["average", "projected"])
def test_equals_the_dense_definition_of_the_paper(estimator: str) -> None:
    """Eqs. 10-12 and 14 with true pseudo-inverses; for well-conditioned factors damping changes about 1e-5."""
    A, B, grad_A, grad_B = factors()
    from_B, from_A = grad_B @ torch.linalg.pinv(A.T) / S, torch.linalg.pinv(B.T) @ grad_A / S
    dense = (from_B + from_A) / 2 if estimator == "average" else from_B
    expected = dense @ torch.linalg.pinv(A) / S
    if estimator == "average":
        ours = ascent_average(*batch(A, B, grad_A, grad_B), scaling())
    else:
        ours = ascent_projected(*batch(A, grad_B), scaling())
    assert relative_error(ours.direction[0], expected) < 1e-4
    assert relative_error(ours.squared_norm[0], dense.square().sum()) < 1e-4
    damped, damped_norm = ascent(A, B, grad_A, grad_B, S, estimator)
    assert relative_error(ours.direction[0], damped) < 1e-12
    assert relative_error(ours.squared_norm[0], damped_norm) < 1e-12


def random_factors(rank: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).double() for shape in ((rank, m), (n, rank), (n, m)))  # type: ignore[return-value]


def nearly_parallel(share: float, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's first step makes B's columns parallel; a Gram matrix in plain float32 would lose three digits there."""
    A, B, G = random_factors(*sizes)
    return A, B[:, :1] + share * B, G


def of_size(of_B: float, of_G: float) -> tuple[Tensor, Tensor, Tensor]:
    """B has rank 3 in 4 columns; the direction grows with the gradient, and shrinks as the factors grow."""
    A, B, G = random_factors(R, N, M)
    B = B[:, :-1] @ torch.randn(R - 1, R, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return A, of_B * B, of_G * G


NARROW = [nearly_parallel(share, R, N, M) for share in (1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-8)]
NARROW += [nearly_parallel(share, 150, 320, 256) for share in (1.0, 1e-2, 1e-8)]
for size in (1e-12, 1e-6, 1e6, 1e12):
    NARROW += [of_size(size, 1.0), of_size(1.0, size)]


@pytest.mark.parametrize("number", range(len(NARROW)))
def test_float32_is_good_to_1e_5_whatever_the_condition_and_the_size(number: int) -> None:
    A, B, G = NARROW[number]
    narrow = [tensor.float() for tensor in (A, B, S * B.T @ G, S * G @ A.T)]
    exact = ascent_average(*batch(*(t.double() for t in narrow)), scaling())
    ours = ascent_average(*batch(*narrow), scaling(torch.float32))
    assert relative_error(ours.direction, exact.direction) < 1e-5
    assert relative_error(ours.squared_norm, exact.squared_norm) < 1e-5


@pytest.mark.parametrize("estimator", ["average", "projected"])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_noise_where_the_rows_of_A_are_dependent_stays_noise(columns: int, estimator: str) -> None:
    """If A has more rows than columns (an input of few features), B's gradient is only rounding in A's null space."""
    generator = torch.Generator().manual_seed(0)
    A, G = torch.randn(16, columns, generator=generator), torch.randn(32, columns, generator=generator)
    B, noise = torch.randn(32, 16, generator=generator), torch.randn(32, 16, generator=generator)
    grad_A, grad_B = S * B.mT @ G, S * G @ A.mT
    found = []
    for share in (0.0, 1e-3):
        rounded = grad_B + share * grad_B.norm() / noise.norm() * noise
        if estimator == "average":
            found.append(ascent_average(*batch(A, B, grad_A, rounded), scaling(torch.float32)))
        else:
            found.append(ascent_projected(*batch(A, rounded), scaling(torch.float32)))
    assert relative_error(found[1].direction, found[0].direction) < 5e-3
    assert relative_error(found[1].squared_norm, found[0].squared_norm) < 5e-3


@pytest.mark.parametrize("rank", [1, R, 64, 150, 256])
def test_the_damped_inverse_is_its_definition_and_tends_to_the_pseudo_inverse(rank: int) -> None:
    X = torch.randn(3, 3 * rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = X.mT @ X
    trace = K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    root = damped_inverse_root(X)
    assert root.equal(root.tril())
    inverse = root.mT @ root
    expected = torch.linalg.inv(K + DAMPING * trace * torch.eye(rank, dtype=torch.float64))
    assert relative_error(inverse, expected) < 1e-12
    assert relative_error(inverse, torch.linalg.pinv(K)) < 5e-3
    assert relative_error(damped_inverse_root(X.float()).double(), root) < 1e-6
    assert torch.isfinite(damped_inverse_root(torch.zeros(3 * rank, rank))).all()


def test_a_batch_of_layers_is_the_layers_one_by_one() -> None:
    layers = [factors() for _ in range(3)]
    layers[1] = tuple(2 * t for t in layers[1])  # type: ignore[assignment]
    together = ascent_average(*map(torch.stack, zip(*layers, strict=True)), torch.tensor([S, 1.0, 3.0]).double())
    for i, s in enumerate((S, 1.0, 3.0)):
        alone = ascent_average(*batch(*layers[i]), torch.tensor([s]).double())
        assert torch.allclose(together.direction[i], alone.direction[0], rtol=1e-12)
        assert torch.allclose(together.squared_norm[i], alone.squared_norm[0], rtol=1e-12)


PENALTIES = {"L1": lambda factor: factor.abs().sum(), "L2": lambda factor: factor.square().sum()}


def penalized_steps(penalty: str, on: str, strength: float, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """A, B, their gradients, and B's without the penalty, in ten AdamW steps on a regression that starts at B = 0."""
    generator = torch.Generator().manual_seed(0)
    A = nn.Parameter((torch.rand(R, 40, generator=generator, dtype=dtype) * 2 - 1) / 40**0.5)
    B = nn.Parameter(torch.zeros(24, R, dtype=dtype))
    target = torch.randn(24, 40, generator=generator, dtype=dtype) / 40**0.5
    optimizer = torch.optim.AdamW([A, B], lr=1e-2)
    for _ in range(10):
        x = torch.randn(16, 40, generator=generator, dtype=dtype)
        loss = (x @ (S * B @ A - target).mT).square().mean()
        (free_grad_B,) = torch.autograd.grad(loss, B, retain_graph=True)
        penalties = [PENALTIES[penalty](factor) for name, factor in (("A", A), ("B", B)) if name in on]
        optimizer.zero_grad()
        (loss + strength * sum(penalties)).backward()
        assert A.grad is not None
        assert B.grad is not None
        yield A.detach(), B.detach(), A.grad, B.grad, free_grad_B
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("on", ["A", "B", "AB"])
@pytest.mark.parametrize("penalty", ["L1", "L2"])
def test_a_penalty_on_a_factor_leaves_the_radius_what_it_is(penalty: str, on: str, dtype: torch.dtype) -> None:
    """Divided by B, which is zero or small, its gradient must not be taken for a large full gradient."""
    for strength in (0.0, 1e-6, 1e-4, 1e-2, 1.0, 10.0):
        for A, B, grad_A, grad_B, free_grad_B in penalized_steps(penalty, on, strength, dtype):
            ours = ascent_average(*batch(A, B, grad_A, grad_B), scaling(dtype))
            E = ours.direction[0] * perturbation_scale(ours.squared_norm, 1.0)
            assert 0.5 <= (S * E @ A).norm() <= 1 + 1e-5
            assert (E * grad_B).sum() > 0
            if on == "A":
                assert (E * free_grad_B).sum() > 0


@pytest.mark.parametrize("of_B", [0.0, 1e-3])
def test_a_penalty_is_weighed_as_in_the_dense_definition(of_B: float) -> None:
    A, B, grad_A, grad_B = factors()
    grad_A, grad_B = grad_A + 0.3 * A.sign(), grad_B + of_B * B
    direction, squared_norm = ascent(A, B, grad_A, grad_B, S, "average")
    ours = ascent_average(*batch(A, B, grad_A, grad_B), scaling())
    assert relative_error(ours.direction[0], direction) < 1e-12
    assert relative_error(ours.squared_norm[0], squared_norm) < 1e-12
    without = ascent_average(*batch(A, B, S * B.mT @ torch.ones(N, M).double(), grad_B), scaling())
    assert relative_error(without.squared_norm[0], squared_norm) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_zero_B_the_gradient_of_A_says_nothing(dtype: torch.dtype) -> None:
    """At B = 0 no loss of the full weight has a gradient with respect to A; a non-finite one is still noticed."""
    A, B, grad_A, grad_B = factors(dtype)
    nothing = ascent_average(*batch(torch.zeros_like(A), B, grad_A, torch.zeros_like(grad_B)), scaling(dtype))
    assert (nothing.direction == 0).all()
    B = torch.zeros_like(B)
    plain = ascent_average(*batch(A, B, torch.zeros_like(grad_A), grad_B), scaling(dtype))
    from_B = ascent_projected(*batch(A, grad_B), scaling(dtype))
    assert torch.allclose(plain.direction * 2, from_B.direction)
    assert torch.allclose(plain.squared_norm * 4, from_B.squared_norm)
    penalized = ascent_average(*batch(A, B, 1e3 * grad_A, grad_B), scaling(dtype))
    assert torch.equal(penalized.direction, plain.direction)
    assert torch.equal(penalized.squared_norm, plain.squared_norm)
    for bad in (torch.nan, torch.inf):
        grad_A[1, 2] = bad
        assert not torch.isfinite(ascent_average(*batch(A, B, grad_A, grad_B), scaling(dtype)).squared_norm).any()


def test_the_scale_is_rho_over_the_norm_and_zero_without_a_gradient() -> None:
    squared = torch.tensor([4.0, 0.0, -1e-12])
    assert torch.equal(perturbation_scale(squared, 3.0), torch.tensor([1.5, 0.0, 0.0]))
