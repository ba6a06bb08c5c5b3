"""Sharpness and curvature compared with closed forms on quadratics, dense Hessians, and the method's reference."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quadratics import RHO, Quadratic, average_of, state_of
from reference import ascent, perturbations
from torch import Tensor, nn

from lightning_flatlora import Perturbation
from lightning_flatlora.flatness import (
    MeanLoss,
    critical_sharpness,
    ema_sharpness,
    expected_sharpness,
    hessian_product,
    hessian_trace,
    lora_sharpness,
    loss_gradient,
    sam_sharpness,
    top_eigenvalue,
    trained_factors,
)
from lightning_flatlora.flatness.sharpness import read
from lightning_flatlora.full_weight import WeightNoise

INSTRUMENTS = ("sam", "lora", "ema", "expected")
CURVATURES = {"top_eigenvalue": top_eigenvalue, "hessian_trace": hessian_trace}


def run(instrument: str, quadratic: Quadratic, perturbation: Perturbation, loss: Any) -> Any:
    if instrument == "sam":
        return sam_sharpness(loss, perturbation, RHO)
    if instrument == "lora":
        return lora_sharpness(loss, quadratic.pairs, RHO)
    if instrument == "ema":
        return ema_sharpness(loss, perturbation, RHO)
    if instrument in CURVATURES:
        return CURVATURES[instrument](loss, trained_factors(quadratic.pairs))
    return expected_sharpness(loss, WeightNoise(quadratic.model), sigma=0.1, samples=3)


def dense_moves(quadratic: Quadratic, norm_scope: str) -> list[Tensor]:
    """s E A of each layer, by the literal reference."""
    ascents = []
    for pair, G in zip(quadratic.pairs, quadratic.gradients(), strict=True):
        A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
        ascents.append(ascent(A, B, s * B.mT @ G, s * G @ A.mT, s, "average"))
    E = perturbations(ascents, RHO, norm_scope)
    return [pair.scaling * e @ pair.A.detach() for pair, e in zip(quadratic.pairs, E, strict=True)]


@pytest.mark.parametrize("norm_scope", ["global", "layer"])
def test_sam_sharpness_of_a_quadratic_is_slope_and_curvature_along_E(norm_scope: Any) -> None:
    quadratic = Quadratic()
    moves = dense_moves(quadratic, norm_scope)
    along = sum((G * move).sum() for G, move in zip(quadratic.gradients(), moves, strict=True))
    curved = sum(move.square().sum() / 2 for move in moves)
    found = sam_sharpness(quadratic.loss, Perturbation(quadratic.pairs, norm_scope=norm_scope), RHO)
    torch.testing.assert_close(found.sharpness, along + curved, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.loss, quadratic.dense_loss([0 * move for move in moves]))
    torch.testing.assert_close(found.perturbed, quadratic.dense_loss(moves), rtol=1e-9, atol=0)


def test_lora_sharpness_moves_both_factors_along_their_joint_gradient() -> None:
    quadratic = Quadratic()
    pairs, G = quadratic.pairs, quadratic.gradients()
    grads_A = [p.scaling * p.B.mT @ g for p, g in zip(pairs, G, strict=True)]
    grads_B = [p.scaling * g @ p.A.mT for p, g in zip(pairs, G, strict=True)]
    norm = torch.stack([grad.square().sum() for grad in grads_A + grads_B]).sum().sqrt()
    moves = []
    for p, grad_A, grad_B in zip(pairs, grads_A, grads_B, strict=True):
        moved = (p.B + RHO * grad_B / norm) @ (p.A + RHO * grad_A / norm)
        moves.append(p.scaling * (moved - p.B @ p.A))
    found = lora_sharpness(quadratic.loss, pairs, RHO)
    torch.testing.assert_close(found.perturbed, quadratic.dense_loss(moves).detach(), rtol=1e-12, atol=0)
    assert found.sharpness > 0


def test_the_ema_is_compared_with_the_fresh_perturbation() -> None:
    quadratic = Quadratic()
    perturbation = average_of(quadratic.pairs, quadratic.loss)
    averages, fresh = read(perturbation), dense_moves(quadratic, "global")
    average = [p.scaling * E @ p.A.detach() for p, E in zip(quadratic.pairs, averages, strict=True)]
    found = ema_sharpness(quadratic.loss, perturbation, RHO)
    clean = quadratic.dense_loss([0 * move for move in fresh])
    torch.testing.assert_close(found.ema, quadratic.dense_loss(average) - clean, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sam, quadratic.dense_loss(fresh) - clean, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.gap, (found.ema - found.sam).abs(), rtol=1e-9, atol=0)
    flat_average = torch.cat([move.flatten() for move in average])
    flat_fresh = torch.cat([move.flatten() for move in fresh])
    expected = torch.nn.functional.cosine_similarity(flat_average, flat_fresh, dim=0)
    torch.testing.assert_close(found.cosine, expected, rtol=1e-9, atol=0)
    assert found.gap > 0
    assert 0.1 < found.cosine < 0.999


def test_expected_sharpness_of_a_quadratic_is_half_the_noises_size() -> None:
    """E 1/2 ||eps||^2 = sigma^2 / 2 ||W||^2; the mean over samples is within its standard error."""
    quadratic = Quadratic()
    sigma = 0.2
    found = expected_sharpness(quadratic.loss, WeightNoise(quadratic.model), sigma, samples=400, seed=5)
    expected = sigma**2 / 2 * sum(W.square().sum() for W in quadratic.weights())
    assert abs(found.sharpness - expected) < 3 * found.standard_error
    assert 0 < found.standard_error < expected / 4


def test_expected_sharpness_is_the_mean_over_its_seeds() -> None:
    quadratic = Quadratic()
    noise, losses = WeightNoise(quadratic.model), []
    for seed in (7, 8, 9):
        with noise.applied(0.2, seed):
            losses.append(quadratic.loss().detach())
    found = expected_sharpness(quadratic.loss, noise, 0.2, samples=3, seed=7)
    torch.testing.assert_close(found.perturbed, torch.stack(losses).mean())
    torch.testing.assert_close(found.standard_error, torch.stack(losses).std() / 3**0.5)


@pytest.mark.parametrize("instrument", [*INSTRUMENTS, *CURVATURES])
@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_everything_is_left_as_it_was(instrument: str, fails_at: int | None) -> None:
    """Existing gradients and a reader that shows Ê are kept, also if the loss raises in its first or second pass."""
    quadratic = Quadratic()
    perturbation = average_of(quadratic.pairs, quadratic.loss)
    quadratic.loss().backward()
    perturbation.install()
    perturbation.on()
    check, calls = state_of(quadratic.model, quadratic.pairs), []

    def loss() -> Tensor:
        calls.append(None)
        if len(calls) - 1 == fails_at:
            raise ZeroDivisionError
        return quadratic.loss()

    if fails_at is None:
        run(instrument, quadratic, perturbation, loss)
    else:
        with pytest.raises(ZeroDivisionError):
            run(instrument, quadratic, perturbation, loss)
    check()


@pytest.mark.parametrize("instrument", INSTRUMENTS[:3])
def test_it_is_measured_from_the_clean_weights(instrument: str) -> None:
    quadratic = Quadratic()
    perturbation = average_of(quadratic.pairs, quadratic.loss)
    expected = run(instrument, quadratic, perturbation, quadratic.loss)
    perturbation.install()
    perturbation.on()
    assert run(instrument, quadratic, perturbation, quadratic.loss) == expected


@pytest.mark.parametrize("instrument", INSTRUMENTS[:3])
def test_a_zero_gradient_has_no_sharpness_and_one_not_finite_has_nan(instrument: str) -> None:
    quadratic = Quadratic()
    perturbation = Perturbation(quadratic.pairs)
    flat = run(instrument, quadratic, perturbation, lambda: 0 * quadratic.loss() + 1)
    broken = run(instrument, quadratic, perturbation, lambda: quadratic.loss() * torch.inf)
    assert getattr(flat, "sam" if instrument == "ema" else "sharpness") == 0
    assert getattr(broken, "sam" if instrument == "ema" else "sharpness").isnan()


def test_a_gradient_by_batches_is_the_gradient_of_the_mean() -> None:
    """The graph of a batch is freed before the next one is built, so it takes the memory of one batch."""
    quadratic = Quadratic()
    parameters = trained_factors(quadratic.pairs)
    graphs = []

    def part(weight: float) -> Tensor:
        assert all(graph() is None for graph in graphs)
        loss = weight * quadratic.loss()
        graphs.append(weakref.ref(loss))
        return loss

    losses = MeanLoss([lambda: part(1.0), lambda: part(2.0), lambda: part(6.0)])
    found = loss_gradient(losses, parameters, scale=8.0)
    expected = loss_gradient(lambda: 3 * quadratic.loss(), parameters)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.gradients, expected.gradients)
    assert len(graphs) == 3
    with pytest.raises(ValueError, match="at least one"):
        MeanLoss([])


def dense_hessian(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """Row by row, over all parameters as one vector."""
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


def test_an_eigenvalue_that_does_not_converge_is_nan() -> None:
    w = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    curvatures = torch.linspace(0, 1, 400, dtype=torch.float64)
    found = top_eigenvalue(lambda: (curvatures * w.square()).sum() / 2, [w], tolerance=1e-14, restarts=1)
    assert found.isnan()


def test_the_critical_sharpness_of_a_quadratic_is_the_curvature_along_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian, w = root @ root.T, nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    for lowest in (0.0, -7.0, 1e-4):  # the size of the first step tried depends on the loss itself

        def loss(lowest: float = lowest) -> Tensor:
            return w @ hessian @ w / 2 + lowest

        at = loss_gradient(loss, [w])
        (gradient,) = at.gradients
        along = gradient @ hessian @ gradient / gradient.square().sum()
        before = w.detach().clone()
        assert abs(critical_sharpness(loss, at) / along - 1) < 0.05
        assert torch.equal(w, before)


def test_a_critical_sharpness_without_a_critical_step_is_zero_or_not_known() -> None:
    w = nn.Parameter(torch.ones(3))
    assert critical_sharpness(w.sum, loss_gradient(w.sum, [w])) == 0
    for loss in (lambda: 0 * w.sum(), lambda: torch.inf * w.sum()):
        assert critical_sharpness(loss, loss_gradient(loss, [w])).isnan()


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
    )  # the known variance of Hutchinson's estimator with random signs


def test_one_sample_has_no_standard_error_and_none_no_mean() -> None:
    w = nn.Parameter(torch.ones(2))
    found = hessian_trace(lambda: w.square().sum(), [w], samples=1)
    assert found.mean == 4
    assert found.standard_error.isnan()
    with pytest.raises(ValueError, match="set samples to 1 or more"):
        hessian_trace(lambda: w.square().sum(), [w], samples=0)


def test_attention_has_a_second_derivative() -> None:
    """The fused kernels that are used in inference and training don't have one."""
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
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-flatlora\[flatness\]'"):
        top_eigenvalue(lambda: torch.ones(()), [nn.Parameter(torch.ones(3))])
