"""The method's seven properties (docs/method.md) on real peft layers, and E for unusual gradients."""

import copy

import pytest
import torch
from perturbation_models import RHO, backward, fresh, model_and_pairs, slices
from torch import Tensor

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair


def full(pair: LoRAPair, E: Tensor) -> Tensor:
    """s E A, the perturbation in full weight space, (n, m)."""
    return pair.scaling * E @ pair.A.detach().flatten(1)


settings = pytest.mark.parametrize("estimator", ["average", "projected"])
scopes = pytest.mark.parametrize("norm_scope", ["global", "layer"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_1_both_gradients_agree(dropout: float, use_dora: bool) -> None:
    """B^T G_B = G_A A^T, for every LoRA layer, dropout included."""
    model, pairs = model_and_pairs(dropout=dropout, use_dora=use_dora)
    backward(model)
    for pair in pairs:
        B, A, grad_B, grad_A = (t.flatten(1) for t in (pair.B.data, pair.A.data, pair.B.grad, pair.A.grad))
        assert torch.allclose(B.T @ grad_B, grad_A @ A.T, atol=1e-13)
        assert (grad_B != 0).any()


@settings
@scopes
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        # A power of two changes no bit: fp16's loss scale leaves E as it is.
        (torch.float32, 2.0**14, 0.0),
        (torch.float32, 3.7, 1e-4),
        # More than float32 can square.
        (torch.float64, 1e30, 1e-9),
        (torch.float64, 1e-30, 1e-9),
    ],
)
def test_2_the_loss_may_be_scaled(
    estimator: str, norm_scope: str, dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    model, pairs = model_and_pairs(dtype)
    found = []
    for each in (1.0, scale):
        backward(model, scale=each)
        found.append(fresh(pairs, estimator=estimator, norm_scope=norm_scope))
    for name, E in found[0].items():
        torch.testing.assert_close(found[1][name], E, rtol=tolerance, atol=tolerance / 100)


@settings
@scopes
def test_3_the_full_space_perturbation_does_not_depend_on_the_factors(estimator: str, norm_scope: str) -> None:
    """(B M, M^-1 A) for M = c orthogonal, exactly; for a general M up to the damping."""
    model, pairs = model_and_pairs()
    backward(model)
    before = {p.name: full(p, E) for p, E in zip(pairs, fresh(pairs, estimator=estimator).values(), strict=True)}
    for M, tolerance in ((2.5 * torch.linalg.qr(torch.randn(3, 3).double())[0], 1e-10), (torch.randn(3, 3), 1e-2)):
        other = copy.deepcopy(model)
        moved = find_pairs(other).pairs
        with torch.no_grad():
            for pair in moved:
                pair.B.copy_((pair.B.flatten(1) @ M.double()).view_as(pair.B))
                pair.A.copy_((torch.linalg.inv(M.double()) @ pair.A.flatten(1)).view_as(pair.A))
        backward(other)
        for pair, E in zip(moved, fresh(moved, estimator=estimator).values(), strict=True):
            error = (full(pair, E) - before[pair.name]).norm() / before[pair.name].norm()
            assert error < tolerance


@settings
@scopes
def test_4_it_is_an_ascent_direction(estimator: str, norm_scope: str) -> None:
    """<G_B, E> >= 0 for each pair, and the loss at B + E is larger."""
    model, pairs = model_and_pairs()
    clean = backward(model)
    perturbation = Perturbation(pairs, estimator=estimator, norm_scope=norm_scope)  # type: ignore[arg-type]
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    E = perturbation.state_dict()["E"]
    assert all((pair.B.grad.flatten(1) * E[pair.name]).sum() > 0 for pair in pairs)
    with perturbation.applied():
        assert backward(model) > clean
    assert backward(model) == clean


@settings
@scopes
@pytest.mark.parametrize("at_start", [True, False])
def test_5_the_realized_radius_is_at_most_rho(estimator: str, norm_scope: str, at_start: bool) -> None:
    model, pairs = model_and_pairs()
    if at_start:
        for pair in pairs:
            pair.B.data.zero_()
    backward(model)
    E = fresh(pairs, estimator=estimator, norm_scope=norm_scope)
    norms = torch.stack([full(pair, E[pair.name]).norm() for pair in pairs])
    radii = norms if norm_scope == "layer" else norms.norm()[None]
    assert (radii <= RHO * (1 + 1e-9)).all()
    if estimator == "projected" or at_start:
        assert (radii > RHO * (1 - 1e-3)).all()
    else:
        assert (radii > RHO * 0.5).all()


def test_6_rho_zero_is_nothing_and_rho_is_something() -> None:
    model, pairs = model_and_pairs()
    backward(model)
    perturbation = Perturbation(pairs)
    nothing = perturbation.ascend(0.0, at_perturbed=False)
    assert nothing.is_zero
    assert all((stack == 0).all() for stack in nothing.stacks)
    something = perturbation.ascend(RHO, at_perturbed=False)
    assert not something.is_zero
    assert all((stack != 0).any() for stack in something.stacks)


def test_7_beta_one_keeps_the_last_and_the_first_is_taken_whole() -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    backward(model, seed=1)
    first = perturbation.ascend(RHO, at_perturbed=False)
    perturbation.average(first, beta=0.25)
    kept = perturbation.state_dict()["E"]
    assert all(torch.equal(kept[p.name], E) for p, E in zip(pairs, slices(first.stacks), strict=True))
    backward(model, seed=2)
    second = perturbation.ascend(RHO, at_perturbed=False)
    perturbation.average(second, beta=0.25)
    kept = perturbation.state_dict()["E"]
    for pair, old, new in zip(pairs, slices(first.stacks), slices(second.stacks), strict=True):
        assert torch.allclose(kept[pair.name], 0.75 * old + 0.25 * new, rtol=1e-12)
    perturbation.average(first, beta=1.0)
    kept = perturbation.state_dict()["E"]
    assert all(torch.equal(kept[p.name], E) for p, E in zip(pairs, slices(first.stacks), strict=True))


@pytest.mark.parametrize("which", ["A", "B"])
@settings
def test_a_gradient_that_is_not_finite_changes_nothing(which: str, estimator: str) -> None:
    """If it is the first one, the next is taken as it is, without averaging."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs, estimator=estimator)  # type: ignore[arg-type]
    backward(model, scale=float("inf"))
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.25)
    backward(model)
    good = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(good, beta=0.25)
    before = perturbation.state_dict()["E"]
    assert all(torch.equal(before[p.name], E) for p, E in zip(pairs, slices(good.stacks), strict=True))
    getattr(pairs[1], which).grad[0, 0] = float("nan")
    bad = perturbation.ascend(RHO, at_perturbed=True)
    assert not bad.finite
    assert all((stack == 0).all() for stack in bad.stacks)
    perturbation.average(bad, beta=0.5)
    after = perturbation.state_dict()["E"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@scopes
def test_missing_gradients_count_as_zero(norm_scope: str) -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs, norm_scope=norm_scope)  # type: ignore[arg-type]
    model.zero_grad()
    assert all((stack == 0).all() for stack in perturbation.ascend(RHO, at_perturbed=False).stacks)
    backward(model)
    pairs[0].A.grad = pairs[0].B.grad = None
    stacks = perturbation.ascend(RHO, at_perturbed=False).stacks
    assert (stacks[0] == 0).all()
    assert (stacks[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32(dtype: torch.dtype) -> None:
    model, pairs = model_and_pairs(torch.float32)
    backward(model)
    exact = fresh(pairs)
    low = copy.deepcopy(model).to(dtype)
    low_pairs = find_pairs(low).pairs
    for pair, source in zip(low_pairs, pairs, strict=True):
        pair.A.grad, pair.B.grad = source.A.grad.to(dtype), source.B.grad.to(dtype)
    ours = fresh(low_pairs)
    for name, E in ours.items():
        assert E.dtype == torch.float32
        assert (E - exact[name]).norm() / exact[name].norm() < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_bad_arguments_are_named() -> None:
    """The checks of the settings themselves are tested in methods/test_values.py."""
    _, pairs = model_and_pairs()
    with pytest.raises(ValueError, match="estimator must be 'average' or 'projected', got 'projectd'"):
        Perturbation(pairs, estimator="projectd")  # type: ignore[arg-type]
    perturbation = Perturbation(pairs)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got nan"):
        perturbation.ascend(float("nan"), at_perturbed=False)
    with pytest.raises(ValueError, match="beta must be in"):
        perturbation.average(perturbation.ascend(0.5, at_perturbed=False), 1.5)


@settings
def test_the_algebra_is_outside_of_autocast(estimator: str) -> None:
    """E has the same bits as without it, though in manual optimization the step is inside."""
    model, pairs = model_and_pairs(torch.float32)
    backward(model)
    expected = fresh(pairs, estimator=estimator)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = fresh(pairs, estimator=estimator)
        assert all(torch.equal(E, expected[name]) for name, E in found.items())
