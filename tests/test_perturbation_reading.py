"""What the layers read: B + E equals a moved B, switched on and off, also where two perturbations share a model."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import is_installed
from peft import LoraConfig, get_peft_model
from perturbation_models import RHO, backward, model_and_pairs
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from lightning_flatlora import Perturbation, find_pairs, perturbed_read
from lightning_flatlora.flatness.sharpness import clean


@pytest.mark.parametrize(
    "kind", ["Linear", "DoRA", "Conv2d", "Conv1d", "DoRAConv", "MultiheadAttention", "GPT2", "rslora"]
)
def test_reading_b_plus_e_equals_moving_b(kind: str) -> None:
    """Loss and gradients equal those of a copy whose B was really moved; switched off, the clean ones."""
    model, run, tolerance = _layer(kind)
    perturbation = Perturbation(find_pairs(model).pairs)
    generator = torch.Generator().manual_seed(0)
    for stack in perturbation._stacks:
        for E in stack.E:
            E.copy_(torch.randn(E.shape, generator=generator, dtype=E.dtype) * 0.1)
    moved = copy.deepcopy(model)
    E = perturbation.state_dict()["E"]
    with torch.no_grad():
        for pair in find_pairs(moved).pairs:
            pair.B.add_(E[pair.name].view_as(pair.B))
    keys, clean = list(model.state_dict()), run(model).detach()
    perturbation.install()
    assert torch.allclose(run(model).detach(), clean, atol=tolerance)
    with perturbation.applied():
        perturbed = run(model)
        perturbed.backward()
        assert list(model.state_dict()) == keys
    expected = run(moved)
    expected.backward()
    assert torch.allclose(perturbed, expected, atol=tolerance)
    assert abs(float(perturbed.detach() - clean)) > 1e-4
    for pair, other in zip(find_pairs(model).pairs, find_pairs(moved).pairs, strict=True):
        assert torch.allclose(pair.B.grad, other.B.grad, atol=tolerance)
        assert torch.allclose(pair.A.grad, other.A.grad, atol=tolerance)
    perturbation.uninstall()
    assert not is_installed(model)
    assert torch.allclose(run(model).detach(), clean, atol=tolerance)


def _layer(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """A peft model of one kind of layer with random B, what to run, and the tolerance (0: bit for bit)."""
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["0"], "use_dora": kind.startswith("DoRA")}
    tolerance = 0.0
    base: nn.Module
    if kind in ("Linear", "DoRA", "rslora"):
        base, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
        config["use_rslora"] = kind == "rslora"
    elif kind in ("Conv2d", "DoRAConv"):
        base, x = nn.Sequential(nn.Conv2d(2, 6, 3)), torch.randn(4, 2, 5, 5)
    elif kind == "Conv1d":
        base, x = nn.Sequential(nn.Conv1d(2, 6, 3)), torch.randn(4, 2, 8)
    elif kind == "GPT2":
        from transformers.pytorch_utils import Conv1D

        base, x = nn.Sequential(Conv1D(5, 6)), torch.randn(4, 6)
        config["fan_in_fan_out"] = True
    else:
        base, x = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(3, 4, 8)
        tolerance = 1e-5  # peft merges and unmerges the base weight in each forward pass
    model = get_peft_model(base, LoraConfig(**config))  # type: ignore[arg-type]
    with torch.no_grad():
        for pair in find_pairs(model).pairs:
            pair.B.normal_(std=0.3)

    def run(net: nn.Module) -> Tensor:
        if kind == "MultiheadAttention":
            return net.base_model.model[0](x, x, x, need_weights=False)[0].square().mean()  # type: ignore[index, operator]
        return net(x).square().mean()

    return model, run, tolerance


def test_two_perturbations_of_one_model_do_not_disturb_each_other() -> None:
    """A measurement inside a training step may have its own; afterwards the first is read again."""
    model, pairs = model_and_pairs()
    backward(model)
    first, second = Perturbation(pairs), Perturbation(pairs, norm_scope="layer")
    first.install()
    first.assign(first.ascend(RHO, at_perturbed=False))
    with first.applied():
        perturbed = backward(model)
        second.install()
        second.assign(second.ascend(2 * RHO, at_perturbed=False))
        with second.applied():
            assert backward(model) != perturbed
        assert backward(model) == perturbed
    second.uninstall()
    with first.applied():
        assert backward(model) == perturbed
    first.uninstall()
    assert not is_installed(model)


def test_after_anothers_turn_the_own_average_is_read_again() -> None:
    """The one switch must not be trusted where somebody else has given the readers another perturbation."""
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
    first.on()
    assert backward(model) == perturbed
    with pytest.raises(ZeroDivisionError), clean(pairs), second.applied():
        raise ZeroDivisionError
    assert backward(model) == perturbed
    first.off()
    assert backward(model) == clean_loss
    first.uninstall()
    second.uninstall()
    assert not is_installed(model)


def test_on_and_off_are_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are called several times in every step, so they must not walk over all layers."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    perturbation.install()
    clean_loss = backward(model)
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    perturbation.on()
    given: list[nn.Module] = []
    monkeypatch.setattr(perturbed_read, "perturb", lambda module, *rest: given.append(module))
    for _ in range(2):
        perturbation.off()
        assert backward(model) == clean_loss
        perturbation.on()
        assert backward(model) != clean_loss
    assert not given


def test_a_pair_that_has_left_reads_clean_while_somebody_else_keeps_its_reader() -> None:
    _, pairs = model_and_pairs()
    for pair in pairs:
        pair.B.grad = torch.ones_like(pair.B)
    perturbation = Perturbation(pairs, "projected")
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    perturbation.on()
    gone, stays = pairs[0].readers[0], pairs[1].readers[0]
    perturbed_read.install(gone)
    perturbation.follow(pairs[1:])
    perturbation.on()
    assert perturbed_read.shown(gone) is None
    assert perturbed_read.shown(stays) is not None


def test_reading_without_install_is_refused() -> None:
    _, pairs = model_and_pairs()
    with pytest.raises(RuntimeError, match="call install"), Perturbation(pairs).applied():
        pass


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
