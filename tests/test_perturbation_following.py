"""Pairs that stop or start to learn, scalings that change, and states that wait for pairs."""

import dataclasses

import pytest
import torch
from helpers import is_installed
from peft import LoraConfig, get_peft_model
from perturbation_models import RHO, backward, fresh, model_and_pairs, slices
from torch import nn

from lightning_flatlora import Perturbation, find_pairs
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
    perturbation.follow(now)
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
    perturbation.follow(pairs[:1])
    assert not is_installed(pairs[1].readers[0])
    perturbation.uninstall()
    assert not is_installed(model)


def test_a_state_that_waits_and_is_of_another_shape_starts_anew() -> None:
    """(6, 1) would be broadcast into (6, 3) without a word."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    state["E"][pairs[1].name] = state["E"][pairs[1].name][:, :1]
    other = Perturbation(pairs[:1])
    other.load_state_dict(state, may_come=[pair.name for pair in pairs[1:]])
    with pytest.warns(UserWarning, match=r"starts anew.*one\S* has shape \(6, 3\), in the checkpoint \(6, 1\)"):
        other.follow(pairs)
    E = other.state_dict()["E"]
    assert not E[pairs[1].name].any()
    assert torch.equal(E[pairs[2].name], state["E"][pairs[2].name])
    assert other.state_dict()["averaged"] == state["averaged"] | {pairs[1].name: False}


def test_a_state_of_another_scaling_moves_the_weights_as_before() -> None:
    """As where a hook has set the scaling in the run that was saved, and will set it again later in this one."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    name = pairs[0].name
    state["scalings"][name] = 3 * pairs[0].scaling
    other = Perturbation(pairs)
    other.load_state_dict(state)
    other.follow(pairs)
    torch.testing.assert_close(other.state_dict()["E"][name], 3 * state["E"][name])
    other.follow(pairs)
    torch.testing.assert_close(other.state_dict()["E"][name], 3 * state["E"][name])


def test_the_estimate_goes_by_what_is_trained_at_the_ascent() -> None:
    """Of four pairs in one stack: A frozen all along, unfrozen since, frozen since with its gradient, and trained."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    config = LoraConfig(r=2, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    net = get_peft_model(layers, config).double()
    pairs = find_pairs(net).pairs
    pairs[0].A.requires_grad_(False)
    pairs[1].A.requires_grad_(False)
    perturbation = Perturbation(pairs, norm_scope="layer")
    assert len(perturbation._stacks) == 1
    pairs[1].A.requires_grad_(True)
    net(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    pairs[2].A.requires_grad_(False)
    (found,) = perturbation.ascend(0.5, at_perturbed=False).stacks
    for pair, E, estimator in zip(pairs, found, ("projected", "average", "average", "average"), strict=True):
        (expected,) = Perturbation([pair], estimator, "layer").ascend(0.5, at_perturbed=False).stacks  # type: ignore[arg-type]
        torch.testing.assert_close(E, expected[0], rtol=1e-12, atol=1e-14)
    projected, average = (Perturbation([pairs[3]], each, "layer") for each in ("projected", "average"))  # type: ignore[arg-type]
    of_both = [each.ascend(0.5, at_perturbed=False).stacks[0] for each in (projected, average)]
    assert not torch.allclose(*of_both)
