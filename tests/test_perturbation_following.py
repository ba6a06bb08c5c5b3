"""Pairs that stop or start to learn, scalings that change, and states that wait for pairs."""

import dataclasses

import pytest
import torch
from helpers import is_installed
from perturbation_models import RHO, backward, fresh, model_and_pairs, slices
from torch import nn

from lightning_flatlora import Perturbation
from lightning_flatlora.pairs import LoRAPair


def averaged_once(pairs: list[LoRAPair], model: nn.Module, **settings: object) -> Perturbation:
    perturbation = Perturbation(pairs, **settings)  # type: ignore[arg-type]
    perturbation.install()
    backward(model)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    return perturbation


def test_a_frozen_B_is_read_clean_and_its_E_rests() -> None:
    """Also where A is still trained: its gradient does not enter the norm of the others' perturbation."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs, model)
    before = perturbation.state_dict()["E"]
    frozen = pairs[0]
    frozen.B.requires_grad_(False)
    with perturbation.applied():
        assert frozen.readers[0].weight is frozen.B
        assert not torch.equal(pairs[1].readers[0].weight, pairs[1].B)
    model.zero_grad()
    backward(model)
    assert frozen.A.grad is not None
    fresh_E = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(fresh_E, beta=0.5)
    assert torch.equal(perturbation.state_dict()["E"][frozen.name], before[frozen.name])
    perturbation.uninstall()
    together, alone = fresh(pairs), fresh(pairs[1:])
    for pair in pairs[1:]:
        torch.testing.assert_close(together[pair.name], alone[pair.name])


def test_a_pair_that_misses_some_steps_keeps_its_E() -> None:
    """An expert, a dropped layer: what it missed does not enter its average."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs, model)
    before = perturbation.state_dict()
    pairs[0].A.grad = pairs[0].B.grad = None
    for _ in range(3):
        perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    state = perturbation.state_dict()
    assert torch.equal(state["E"][pairs[0].name], before["E"][pairs[0].name])
    assert not torch.equal(state["E"][pairs[1].name], before["E"][pairs[1].name])


def test_an_average_that_began_while_rho_was_0_is_known_to_be_zero_in_a_resumed_run_too() -> None:
    model, pairs = model_and_pairs()
    backward(model)
    first, resumed = Perturbation(pairs), Perturbation(pairs)
    first.average(first.ascend(0.0, at_perturbed=True), beta=0.25)
    resumed.load_state_dict(first.state_dict())
    for perturbation in (first, resumed):
        assert not perturbation.may_be_nonzero
        fresh_E = perturbation.ascend(RHO, at_perturbed=True)
        perturbation.average(fresh_E, beta=0.25)
        assert perturbation.may_be_nonzero
        # The average continues from zero, and does not begin anew.
        expected = 0.25 * slices(fresh_E.stacks)[0]
        assert torch.allclose(perturbation.state_dict()["E"][pairs[0].name], expected)


def test_following_keeps_what_is_known() -> None:
    """A new pair's first E is taken whole, the others continue; s E stays where a scaling changes."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs[1:], model)
    before = perturbation.state_dict()["E"]
    rescaled = dataclasses.replace(pairs[1], scaling=10 * pairs[1].scaling)
    now = [pairs[0], rescaled, *pairs[2:]]
    perturbation.take_pairs(now)
    E = perturbation.state_dict()["E"]
    assert not E[pairs[0].name].any()
    torch.testing.assert_close(E[rescaled.name] * 10, before[rescaled.name])
    assert torch.equal(E[pairs[2].name], before[pairs[2].name])
    fresh_E = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(fresh_E, beta=0.25)
    kept = perturbation.state_dict()["E"]
    first, second, third = slices(fresh_E.stacks)
    assert torch.equal(kept[pairs[0].name], first)
    torch.testing.assert_close(kept[rescaled.name], 0.75 * E[rescaled.name] + 0.25 * second)
    torch.testing.assert_close(kept[pairs[2].name], 0.75 * E[pairs[2].name] + 0.25 * third)
    perturbation.take_pairs(pairs[:1])
    assert not is_installed(pairs[1].readers[0])
    perturbation.uninstall()
    assert not is_installed(model)


def test_a_state_that_waits_and_is_of_another_shape_is_refused() -> None:
    """(6, 1) would be broadcast into (6, 3) without a word."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    state["E"][pairs[1].name] = state["E"][pairs[1].name][:, :1]
    other = Perturbation(pairs[:1])
    other.load_state_dict(state, may_come=[pair.name for pair in pairs[1:]])
    with pytest.raises(ValueError, match=r"one\S* has shape \(6, 3\), in the checkpoint \(6, 1\)"):
        other.take_pairs(pairs)


def test_a_state_of_another_scaling_moves_the_weights_as_before() -> None:
    """As where a hook has set the scaling in the run that was saved, and will set it again later in this one."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    name = pairs[0].name
    state["scalings"][name] = 3 * pairs[0].scaling
    other = Perturbation(pairs)
    other.load_state_dict(state)
    other.take_pairs(pairs)
    torch.testing.assert_close(other.state_dict()["E"][name], 3 * state["E"][name])
    other.take_pairs(pairs)
    torch.testing.assert_close(other.state_dict()["E"][name], 3 * state["E"][name])


@pytest.mark.parametrize(
    ("at_first", "in_the_pass", "at_last", "estimator"),
    [
        (False, False, False, "projected"),
        (False, True, True, "average"),
        (True, True, False, "average"),
        (True, True, True, "average"),
    ],
)
def test_the_estimate_goes_by_what_is_trained_at_the_ascent(
    at_first: bool, in_the_pass: bool, at_last: bool, estimator: str
) -> None:
    """The A of two of three layers is frozen all along, unfrozen since, frozen since with its gradient, or trained."""
    model, pairs = model_and_pairs()

    def train_A(is_trained: bool) -> None:
        for pair in pairs[1:]:
            pair.A.requires_grad_(is_trained)

    train_A(at_first)
    perturbation = Perturbation(pairs, norm_scope="layer")
    train_A(in_the_pass)
    backward(model)
    train_A(at_last)
    found = slices(perturbation.ascend(0.5, at_perturbed=False).stacks)
    for pair, E, expected in zip(pairs, found, ("average", estimator, estimator), strict=True):
        (alone,) = Perturbation([pair], expected, "layer").ascend(0.5, at_perturbed=False).stacks  # type: ignore[arg-type]
        torch.testing.assert_close(E, alone[0], rtol=1e-12, atol=1e-14)
    projected, average = (Perturbation(pairs[2:], each, "layer") for each in ("projected", "average"))  # type: ignore[arg-type]
    of_both = [each.ascend(0.5, at_perturbed=False).stacks[0] for each in (projected, average)]
    assert torch.allclose(*of_both) == (estimator == "projected")
