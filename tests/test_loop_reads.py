"""How a loop's layers are read: by calling them, by a fused kernel, by a compiled layer, and in a measurement."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from float64_runs import BETA, optimizer_of
from helpers import assert_no_trace, same, weights
from hostile_modules import CHECKPOINTS, Checkpointed, Experts, under_peft
from loop_runs import batches, run, squares, started
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_flatlora import Perturbation, find_pairs, loops
from lightning_flatlora.flatness import DEFAULT_MEASURES, Point, hessian_trace, measure
from lightning_flatlora.flatness.losses import loss_gradient
from lightning_flatlora.pairs.lora_pair import trained_factors

INPUTS = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0))

# -- layers that are not called


def called(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


def by_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.forward(x)


def fused(layer: Any, x: Tensor) -> Tensor:
    """Like Unsloth's kernels, which take the weights without calling the layer."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + layer.scaling["default"] * linear(linear(x, A), B)


class TwoLayers(nn.Module):
    """Computes the same function, whichever way its layers are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.ways: list[Callable[[Any, Tensor], Tensor]] = [called, called]

    def forward(self, x: Tensor) -> Tensor:
        return self.ways[1](self.last, torch.tanh(self.ways[0](self.first, x)))


def net_with(first: Any, last: Any = called) -> Any:
    net: Any = under_peft(TwoLayers, "first", "last", init_lora_weights=False)
    net.base_model.model.ways = [first, last]
    return net


def train(net: Any, in_passes: bool = False, **settings: Any) -> tuple[Any, Any]:
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5, beta=BETA, **settings)
    for batch in INPUTS:
        for each_pass in flat.training_passes() if in_passes else [nullcontext()]:
            with each_pass:
                squares(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat, optimizer


@pytest.mark.parametrize("ways", [(by_forward, called), (called, fused), (fused, fused)])
def test_a_layer_that_is_read_and_not_called_is_refused_by_its_name(ways: Any) -> None:
    net = net_with(*ways)
    with pytest.raises(RuntimeError) as caught:
        train(net)
    names = [name for name, way in zip(("first", "last"), ways, strict=True) if way is not called]
    assert f"{len(names)} LoRA factors, such as base_model.model.{names[0]}.lora_B" in str(caught.value)
    assert "If the layers were not called (fused kernels" in str(caught.value)
    assert "flat.training_passes()" in str(caught.value)


@pytest.mark.parametrize("ways", [(by_forward, called), (fused, fused), (called, called)])
def test_inside_the_pass_every_read_is_perturbed(ways: Any) -> None:
    net, usual = net_with(*ways), net_with(called)
    flat, _ = train(net, in_passes=True)
    train(usual)
    # The fused formula has other rounding errors.
    for one, other in zip(weights(net).values(), weights(usual).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert flat.step == len(INPUTS)
    flat.close()
    assert_no_trace(net)


def test_a_layer_that_was_compiled_before_is_refused_and_one_compiled_later_is_not() -> None:
    net = net_with(called)
    inner = net.base_model.model
    inner.first = torch.compile(inner.first, backend="eager")
    with pytest.raises(RuntimeError, match=r"such as .*first.*lora_B.* If the layers were not called"):
        train(net)
    torch.compiler.reset()
    net, usual = net_with(called), net_with(called)
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5, beta=BETA)
    inner = net.base_model.model
    inner.first = torch.compile(inner.first, backend="eager")
    run(flat, net, optimizer, list(INPUTS), loss=squares)
    train(usual)
    for one, other in zip(weights(net).values(), weights(usual).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # The compiled layer still has the method from when the object was open.
    flat.close()
    clean = net_with(called)
    clean.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in net.state_dict().items()})
    assert same(net(INPUTS[0]), clean(INPUTS[0]))
    torch.compiler.reset()


def logs_norms(net: Any) -> None:
    for expert in net.base_model.model.experts:
        expert.lora_B["default"].weight.norm().item()


def evaluates_with_autograd(net: Any) -> None:
    net.eval()
    net(INPUTS[0]).sum().item()
    net.train()


def merges(net: Any) -> None:
    net.merge_adapter()
    net.unmerge_adapter()


@pytest.mark.parametrize("between", [logs_norms, evaluates_with_autograd, merges])
def test_an_expert_that_was_not_called_is_no_mistake_whatever_its_gradient_is(between: Callable[[Any], None]) -> None:
    """Both experts have a gradient, as after DDP's average over ranks."""
    net = under_peft(Experts, "0", "1", init_lora_weights=False)
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5)
    for batch in INPUTS:
        net(batch).square().mean().backward()
        between(net)
        optimizer.step()
        # Zeros instead of None.
        optimizer.zero_grad(set_to_none=False)
    assert flat.step == len(INPUTS)


def test_steps_without_a_gradient_of_lora_are_no_mistake() -> None:
    """For example, steps of a head, while the factors are frozen and their gradients zero."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:3])
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert flat.step == 4


def test_a_measurement_does_not_hide_that_train_was_forgotten() -> None:
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:3])
    x, y = batches()[3]

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(x), y)

    net.eval()
    measure(Point(loss, Perturbation(find_pairs(net).pairs), rho=0.5), ["sharpness"])
    with flat.perturbation.applied(), torch.no_grad():
        loss()
    loss().backward()
    with pytest.raises(RuntimeError, match=r"3 LoRA factors, .* were taken without Ê"):
        optimizer.step()


def test_looking_again_between_backward_and_step_and_a_step_inside_a_pass_are_no_mistakes() -> None:
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    x, y = batches()[2]
    nn.functional.cross_entropy(net(x), y).backward()
    flat.look_again()
    optimizer.step()
    optimizer.zero_grad()
    for each_pass in flat.training_passes():
        with each_pass:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for each_pass in flat.training_passes():
        with each_pass:
            flat.look_again()
            nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[3:4])
    assert flat.step == 6


def test_a_penalty_on_a_weight_is_taken_at_the_clean_one() -> None:
    net = net_with(called)
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5)

    def with_penalty(net: Any, batch: Tensor) -> Tensor:
        return squares(net, batch) + net.base_model.model.first.lora_B["default"].weight.square().sum()

    run(flat, net, optimizer, list(INPUTS), loss=with_penalty)
    assert flat.step == len(INPUTS)


def test_a_gradient_may_be_used_twice() -> None:
    """As in the callback under manual optimization; the object must not blame eval mode for this."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    x, y = batches()[2]
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.step()
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[3:4])
    assert flat.step == 5


# -- measurements while the object is open


@pytest.mark.parametrize("how", [None, "not reentrant", "to the end"])
def test_measures_in_training_mode_are_those_of_eval_mode(how: str | None) -> None:
    net = net_with(called)
    flat, optimizer = train(net)
    model = net if how is None else Checkpointed(net, CHECKPOINTS[how])
    pairs = find_pairs(net).pairs
    factors = trained_factors(pairs)

    def loss() -> Tensor:
        return model(INPUTS[0]).square().mean()

    def values() -> dict[str, Tensor]:
        point = Point(loss, Perturbation(pairs), rho=0.5, average=flat.perturbation)
        taken = dict(measure(point, [*DEFAULT_MEASURES, "ema", "critical_sharpness"]))
        taken["trace"] = hessian_trace(loss, factors, samples=2).mean
        taken |= {str(index): each for index, each in enumerate(loss_gradient(loss, factors).gradients)}
        return taken

    assert net.training
    training = values()
    net.eval()
    # There is no dropout, and the modes differ in nothing else.
    assert same(training, values())
    assert float(training["ema_sharpness"].abs()) > 1e-6
    # The open object reads perturbed weights afterwards, as before.
    net.train()
    assert not same(loss().detach(), training["loss"])
    net(INPUTS[0]).square().mean().backward()
    optimizer.step()
    assert flat.step == len(INPUTS) + 1
