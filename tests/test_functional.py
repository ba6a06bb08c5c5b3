"""The closed forms equal the dense definitions, and have the properties that define them (docs/method.md)."""

import pytest
import torch
from reference import ascent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatlora.functional import (
    DAMPING,
    ascent_average,
    ascent_projected,
    damped_inverse_root,
    perturbation_scale,
)

N, M, R, S = 12, 9, 4, 1.7


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and the gradients that a full gradient G gives at them."""
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
    """Eqs. 10-12 and 14 with true pseudo-inverses; well-conditioned factors, so the damping shows at 1e-5 only."""
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


@pytest.mark.parametrize("parallel", [1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-8])
def test_float32_is_good_to_1e_5_whatever_the_condition(parallel: float) -> None:
    """Adam's first step makes B's columns parallel; a Gram matrix in float32 alone would lose three digits there."""
    A, B, _, _ = factors()
    B = B[:, :1] + parallel * B
    G = torch.randn(N, M, dtype=torch.float64)
    narrow = [tensor.float() for tensor in (A, B, S * B.T @ G, S * G @ A.T)]
    exact = ascent_average(*batch(*(t.double() for t in narrow)), scaling())
    ours = ascent_average(*batch(*narrow), scaling(torch.float32))
    assert relative_error(ours.direction, exact.direction) < 1e-5
    assert relative_error(ours.squared_norm, exact.squared_norm) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_factors_give_zeros_not_nan(dtype: torch.dtype) -> None:
    A, B, grad_A, grad_B = factors(dtype)
    at_start = ascent_average(*batch(A, torch.zeros_like(B), torch.zeros_like(grad_A), grad_B), scaling(dtype))
    from_B = ascent_projected(*batch(A, grad_B), scaling(dtype))
    assert torch.allclose(at_start.direction * 2, from_B.direction)
    assert torch.allclose(at_start.squared_norm * 4, from_B.squared_norm)
    nothing = ascent_average(*batch(torch.zeros_like(A), B, grad_A, torch.zeros_like(grad_B)), scaling(dtype))
    assert torch.isfinite(nothing.direction).all()
    assert (nothing.direction == 0).all()


def test_the_damped_inverse_is_its_definition_and_tends_to_the_pseudo_inverse() -> None:
    X = torch.randn(3, N, R, dtype=torch.float64)
    K = X.mT @ X
    trace = K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    root = damped_inverse_root(X)
    inverse = root.mT @ root
    expected = torch.linalg.inv(K + DAMPING * trace * torch.eye(R, dtype=torch.float64))
    assert relative_error(inverse, expected) < 1e-12
    assert relative_error(inverse, torch.linalg.pinv(K)) < 1e-3
    assert torch.isfinite(damped_inverse_root(torch.zeros(N, R)).float()).all()


def test_a_batch_of_layers_is_the_layers_one_by_one() -> None:
    layers = [factors() for _ in range(3)]
    layers[1] = tuple(2 * t for t in layers[1])  # type: ignore[assignment]
    together = ascent_average(*map(torch.stack, zip(*layers, strict=True)), torch.tensor([S, 1.0, 3.0]).double())
    for i, s in enumerate((S, 1.0, 3.0)):
        alone = ascent_average(*batch(*layers[i]), torch.tensor([s]).double())
        assert torch.allclose(together.direction[i], alone.direction[0], rtol=1e-12)
        assert torch.allclose(together.squared_norm[i], alone.squared_norm[0], rtol=1e-12)


def test_the_scale_is_rho_over_the_norm_and_zero_without_a_gradient() -> None:
    squared = torch.tensor([4.0, 0.0, -1e-12])
    assert torch.equal(perturbation_scale(squared, 3.0), torch.tensor([1.5, 0.0, 0.0]))


def test_no_full_size_tensor_is_made() -> None:
    """Every tensor made on the way has at most as many elements as the larger factor."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    n, m, r = 64, 96, 2
    A, B = torch.randn(1, r, m), torch.randn(1, n, r)
    with Watch():
        ascent_average(A, B, torch.randn_like(A), torch.randn_like(B), torch.ones(1))
        ascent_projected(A, torch.randn_like(B), torch.ones(1))
    assert 0 < largest <= r * max(n, m)
