"""Products with the Hessian, its largest eigenvalue and trace, against dense Hessians and closed forms."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quadratics import Quadratic
from torch import Tensor, nn

from lightning_flatlora.flatness import MeanLoss, hessian_product, hessian_trace, top_eigenvalue, trained_factors


def dense_hessian(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """Row by row, of all parameters in one vector."""
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    rows = []
    for entry in flat:
        parts = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def random_like(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [torch.randn_like(parameter) for parameter in parameters]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_products_are_those_of_the_dense_hessian() -> None:
    quadratic = Quadratic()
    parameters = trained_factors(quadratic.pairs)
    vector = random_like(parameters)
    expected = dense_hessian(quadratic.loss, parameters) @ flat(vector)
    torch.testing.assert_close(flat(hessian_product(quadratic.loss, parameters, vector)), expected)
    batches = MeanLoss([quadratic.loss, lambda: 3 * quadratic.loss()])
    torch.testing.assert_close(flat(hessian_product(batches, parameters, vector)), 2 * expected)


def test_the_top_eigenvalue_is_that_of_the_dense_hessian() -> None:
    quadratic = Quadratic()
    parameters = trained_factors(quadratic.pairs)
    values = torch.linalg.eigvalsh(dense_hessian(quadratic.loss, parameters))
    assert values[0] < 0 < values[-1], "indefinite: the largest, not the largest in size"
    found = top_eigenvalue(quadratic.loss, parameters, tolerance=1e-10, restarts=100)
    torch.testing.assert_close(found, values[-1], rtol=1e-9, atol=0)
    torch.testing.assert_close(top_eigenvalue(quadratic.loss, parameters), values[-1], rtol=1e-2, atol=0)


def test_the_largest_is_found_beside_a_negative_one_of_larger_size() -> None:
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    curvatures = torch.tensor([-9.0, 1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    assert abs(top_eigenvalue(lambda: (curvatures * w.square()).sum() / 2, [w]) - 4) < 1e-6


def test_an_eigenvalue_that_does_not_converge_is_nan() -> None:
    w = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    curvatures = torch.linspace(0, 1, 400, dtype=torch.float64)
    found = top_eigenvalue(lambda: (curvatures * w.square()).sum() / 2, [w], tolerance=1e-14, restarts=1)
    assert found.isnan()


def test_a_hessian_of_zeros_has_the_eigenvalue_zero() -> None:
    w, unused = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.ones(2))
    products = hessian_product(lambda: w.sum(), [w, unused], [torch.ones(30), torch.ones(2)])
    assert not any(product.any() for product in products)
    assert top_eigenvalue(lambda: w.sum(), [w]) == 0
    assert top_eigenvalue(lambda: (w - 1).relu().square().sum(), [w]) == 0, "saturated"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_has_no_eigenvalue(value: float, capfd: pytest.CaptureFixture[str]) -> None:
    w = nn.Parameter(torch.ones(30))
    assert top_eigenvalue(lambda: w[1:].square().sum() + value * w[0].square(), [w]).isnan()
    assert capfd.readouterr() == ("", ""), "LAPACK complains of nan on the screen"


def test_the_trace_is_within_its_standard_error() -> None:
    quadratic = Quadratic()
    parameters = trained_factors(quadratic.pairs)
    hessian = dense_hessian(quadratic.loss, parameters)
    found = hessian_trace(quadratic.loss, parameters, samples=300, seed=2)
    assert abs(found.mean - hessian.trace()) < 3 * found.standard_error
    off_diagonal = hessian - hessian.diag().diag()
    torch.testing.assert_close(
        found.standard_error, (2 * off_diagonal.square().sum() / 300).sqrt(), rtol=0.15, atol=0
    )  # the known variance of Hutchinson's estimator with signs


def test_one_sample_has_no_standard_error_and_none_no_mean() -> None:
    w = nn.Parameter(torch.ones(2))
    found = hessian_trace(lambda: w.square().sum(), [w], samples=1)
    assert found.mean == 4
    assert found.standard_error.isnan()
    with pytest.raises(ValueError, match="let samples be 1 or more"):
        hessian_trace(lambda: w.square().sum(), [w], samples=0)


def test_attention_has_a_second_derivative() -> None:
    """The fused kernels, which inference and training take, have none."""
    torch.manual_seed(0)
    q, k = (nn.Parameter(torch.randn(1, 2, 6, 8)) for _ in range(2))
    v = torch.randn(1, 2, 6, 8)

    def loss() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v).square().sum()

    def by_hand() -> Tensor:
        return (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).square().sum()

    vector = random_like([q, k])
    expected = dense_hessian(by_hand, [q, k]) @ flat(vector)
    torch.testing.assert_close(flat(hessian_product(loss, [q, k], vector)), expected, rtol=1e-4, atol=1e-5)


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'lightning-flatlora\[flatness\]'"):
        top_eigenvalue(lambda: torch.ones(()), [nn.Parameter(torch.ones(3))])
