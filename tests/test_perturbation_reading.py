"""What the layers read, switching B + E on and off, and pairs, scalings and states that change meanwhile."""

import copy
import dataclasses

import pytest
import torch
from helpers import assert_no_trace, is_installed
from hostile_modules import KINDS, Hostile, IsQuantized
from perturbation_models import RHO, backward, fresh, model_and_pairs, slices
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair, readers_of
from lightning_flatlora.perturbed_read import clean

# If a pair is a part of a parameter's rows, its E doesn't have the parameter's shape.
OF_ROWS = ("stacked q, k and v", "grouped convolution")
NETS = [title for title, kind in KINDS.items() if kind.own in (Hostile, IsQuantized) and title not in OF_ROWS]


@pytest.mark.parametrize("title", NETS)
def test_reading_b_plus_e_equals_moving_b(title: str) -> None:
    """Loss and gradients equal bit for bit those of a copy whose B was moved and, switched off, the clean ones."""
    kind = KINDS[title]
    model, x = kind.net(), torch.randn(4, 6)
    # peft merges the update into this layer's base weight and takes it out again in each forward pass.
    tolerance = 1e-5 if title == "MultiheadAttention" else 0.0

    def loss_and_gradients(net: nn.Module, pairs: list[LoRAPair]) -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(0)
        net.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        gradients = []
        for pair in pairs:
            gradients += [None if factor.grad is None else factor.grad.clone() for factor in (pair.A, pair.B)]
        return loss.detach(), gradients

    pairs = find_pairs(model, finder=kind.settings.get("finder")).pairs
    with torch.no_grad():
        for pair in pairs:
            pair.B.normal_(std=0.3)
    perturbation = Perturbation(pairs)
    for stack in perturbation._stacks:
        stack.E.normal_(std=0.1)
    E, keys = perturbation.state_dict()["E"], list(model.state_dict())
    clean = loss_and_gradients(model, pairs)[0]
    moved = copy.deepcopy(model)
    moved_pairs = find_pairs(moved, finder=kind.settings.get("finder")).pairs
    with torch.no_grad():
        for pair in moved_pairs:
            pair.B.add_(E[pair.name].view_as(pair.B))
    perturbation.install()
    torch.testing.assert_close(loss_and_gradients(model, pairs)[0], clean, rtol=0, atol=tolerance)
    with perturbation.applied():
        perturbed, gradients = loss_and_gradients(model, pairs)
        assert list(model.state_dict()) == keys or tolerance
    expected, others = loss_and_gradients(moved, moved_pairs)
    torch.testing.assert_close(perturbed, expected, rtol=0, atol=tolerance)
    assert perturbed != clean
    assert any(gradient is not None for gradient in gradients)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance)
    perturbation.uninstall()
    assert_no_trace(model)
    torch.testing.assert_close(loss_and_gradients(model, pairs)[0], clean, rtol=0, atol=tolerance)


def test_after_anothers_turn_the_own_average_is_read_again() -> None:
    """If several perturbations are on, the one that was switched on last is read."""
    model, pairs = model_and_pairs()
    clean_loss = backward(model)
    first, second = Perturbation(pairs), Perturbation(pairs)
    first.install()
    second.install()
    first.assign(first.ascend(RHO, at_perturbed=False))
    second.assign(second.ascend(2 * RHO, at_perturbed=False))
    first.on()
    perturbed = backward(model)
    assert perturbed != clean_loss
    second.on()
    assert backward(model) not in (perturbed, clean_loss)
    second.off()
    assert backward(model) == perturbed
    with pytest.raises(ZeroDivisionError), clean(readers_of(pairs)), second.applied():
        raise ZeroDivisionError
    assert backward(model) == perturbed
    first.off()
    assert backward(model) == clean_loss
    first.uninstall()
    second.uninstall()
    assert not is_installed(model)


def test_switching_off_inside_leaves_what_is_applied() -> None:
    """As when a second pass runs within a method that switches its average off."""
    model, pairs = model_and_pairs()
    clean_loss = backward(model)
    perturbation = Perturbation(pairs)
    perturbation.install()
    fresh_E = perturbation.ascend(RHO, at_perturbed=False)
    perturbation.on()
    with perturbation.applied(fresh_E.stacks):
        perturbed = backward(model)
        perturbation.off()
        assert backward(model) == perturbed != clean_loss
    assert backward(model) == clean_loss
    perturbation.uninstall()


def test_switching_on_without_install_is_refused() -> None:
    _, pairs = model_and_pairs()
    with pytest.raises(RuntimeError, match="call install"):
        Perturbation(pairs).on()


def test_what_is_read_has_the_gradient_of_the_parameter() -> None:
    """A project's own hook finds it by attribute, and may change it in place."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    perturbation.install()
    backward(model)
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    reader = pairs[0].readers[0]
    assert isinstance(reader, nn.Module)
    with perturbation.applied():
        assert reader.weight is not pairs[0].B
        assert reader.weight.grad is pairs[0].B.grad
        reader.weight.grad.zero_()
    assert pairs[0].B.grad is not None
    assert not pairs[0].B.grad.any()
    perturbation.uninstall()


@pytest.mark.parametrize("as_parameters", [False, True])
def test_a_teacher_by_functional_call_computes_with_its_own_values(as_parameters: bool) -> None:
    """What torch.func differentiates is perturbed, as the parameters are."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    perturbation.install()
    inputs = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    model(inputs).square().sum().backward()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    teacher = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    if as_parameters:
        teacher = {name: nn.Parameter(value, requires_grad=False) for name, value in teacher.items()}
    expected = functional_call(model, teacher, (inputs,))
    with perturbation.applied():
        assert torch.equal(functional_call(model, teacher, (inputs,)), expected)
        student = {name: value.detach() for name, value in model.named_parameters()}
        _, loss = grad_and_value(lambda values: functional_call(model, values, (inputs,)).square().sum())(student)
        assert torch.equal(loss, model(inputs).square().sum())
    assert not torch.equal(loss, model(inputs).square().sum())
    perturbation.uninstall()


# -- what changes meanwhile


def averaged_once(pairs: list[LoRAPair], model: nn.Module, **settings: object) -> Perturbation:
    perturbation = Perturbation(pairs, **settings)  # type: ignore[arg-type]
    perturbation.install()
    backward(model)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    return perturbation


def test_a_frozen_B_is_read_clean_and_its_E_rests() -> None:
    """Even if A is still trained: its gradient does not enter the norm of the others' perturbation."""
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
    """Such as an expert or a dropped layer: the steps that it missed don't enter its average."""
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
        # The average continues from zero instead of starting anew.
        expected = 0.25 * slices(fresh_E.stacks)[0]
        assert torch.allclose(perturbation.state_dict()["E"][pairs[0].name], expected)


def test_following_keeps_what_is_known() -> None:
    """A new pair's first E is taken as it is, the others continue; s E stays if a scaling changes."""
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
    """(6, 1) would silently be broadcast to (6, 3)."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    state["E"][pairs[1].name] = state["E"][pairs[1].name][:, :1]
    other = Perturbation(pairs[:1])
    other.load_state_dict(state, may_come=[pair.name for pair in pairs[1:]])
    with pytest.raises(ValueError, match=r"one\S* has shape \(6, 3\), in the checkpoint \(6, 1\)"):
        other.take_pairs(pairs)


def test_a_state_of_another_scaling_moves_the_weights_as_before() -> None:
    """As when a hook set the scaling in the saved run, and will set it again later in this run."""
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
    """The A of two of three layers is always frozen, unfrozen since, frozen since with its gradient, or trained."""
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
