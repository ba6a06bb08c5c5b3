"""What the layers read: B + E equals a moved B, switched on and off, also where two perturbations share a model."""

import copy

import pytest
import torch
from helpers import assert_no_trace, is_installed
from hostile_modules import KINDS, Hostile, IsQuantized
from perturbation_models import RHO, backward, model_and_pairs
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from lightning_flatlora import Perturbation, find_pairs, perturbed_read
from lightning_flatlora.pairs import LoRAPair
from lightning_flatlora.pairs.lora_pair import readers_of
from lightning_flatlora.perturbed_read import clean

# Where a pair is rows of a parameter, its E has not the parameter's shape.
OF_ROWS = ("stacked q, k and v", "grouped convolution")
NETS = [title for title, kind in KINDS.items() if kind.own in (Hostile, IsQuantized) and title not in OF_ROWS]


@pytest.mark.parametrize("title", NETS)
def test_reading_b_plus_e_equals_moving_b(title: str) -> None:
    """Loss and gradients equal those of a copy whose B was really moved, bit for bit; switched off, the clean ones."""
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
    """Of several that are on, that of the last owner is read."""
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


def test_a_pair_that_has_left_reads_clean_while_somebody_else_keeps_its_reader() -> None:
    _, pairs = model_and_pairs()
    for pair in pairs:
        pair.B.grad = torch.ones_like(pair.B)
    perturbation = Perturbation(pairs, "projected")
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    perturbation.on()
    gone, stays = pairs[0].readers[0], pairs[1].readers[0]
    somebody_else = perturbed_read.Switch()
    perturbed_read.perturb(gone, torch.zeros_like(pairs[0].B), somebody_else)
    perturbation.take_pairs(pairs[1:])
    perturbation.on()
    assert perturbed_read.shown(gone) is None
    assert perturbed_read.shown(stays) is not None
    perturbation.uninstall()
    perturbed_read.release(gone, somebody_else)
    assert not is_installed(nn.ModuleList([gone, stays]))


def test_switching_off_inside_leaves_what_is_applied() -> None:
    """As where a second pass lies within a method that switches its average off."""
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
    """And what is differentiated by torch.func is perturbed, as the parameters are."""
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
