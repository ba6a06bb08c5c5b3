"""What can't work in a loop is refused: at the start, or before a step without a perturbation."""

import logging
import re
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from float64_runs import loss, optimizer_of
from helpers import assert_no_trace, make_net, same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import METHODS, batches, method_of, net_of, run, started
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import LinearRho, loops
from lightning_flatlora.loops.forward_gate import PASSES_UNTIL_WARNING

# -- at the start


def of_library(name: str) -> nn.Module:
    return type("Engine", (nn.Sequential,), {"__module__": f"{name}.runtime.engine"})(make_net())


def merged() -> nn.Module:
    net: Any = make_net()
    net.merge_adapter()
    return net


def sgd(net: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, **settings)


def of_a_part(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([next(p for p in net.parameters() if p.requires_grad)], lr=0.1)


def of_b(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for name, p in net.named_parameters() if "lora_B" in name], lr=0.1)


def of_opacus(net: nn.Module) -> Any:
    """An optimizer that wraps another, without its hooks."""
    optimizer = object.__new__(type("DPOptimizer", (torch.optim.Optimizer,), {"__module__": "opacus.optimizers"}))
    optimizer.original_optimizer = sgd(net)
    return optimizer


def plain_parts() -> nn.Module:
    """As transformers 5.4 to 5.16 leave it, with a part of each weight as a plain tensor."""
    net: Any = make_net()
    net.base_model.model[0].base_layer._hf_tp_plan = "colwise"
    return net


@dataclass
class Case:
    """What is refused, and the words of the message."""

    words: str
    model: Callable[[], nn.Module] = make_net
    optimizer: Callable[[nn.Module], Any] = sgd
    rho: Any = 0.3
    settings: dict[str, Any] = field(default_factory=dict)


REFUSED = {
    "no horizon": Case("set total_steps", rho=LinearRho(1.0, 0.0)),
    "total_steps": Case(
        "total_steps must be an integer >= 1, got 0", rho=LinearRho(1.0, 0.0), settings={"total_steps": 0}
    ),
    "each other's place": Case("must be a model and its torch.optim.Optimizer", optimizer=lambda net: net),
    "an optimizer of other parameters": Case("are not in the optimizer", optimizer=of_a_part),
    "an optimizer of B": Case("such as base_model.model.0.lora_A.default.weight, are not in", optimizer=of_b),
    "Opacus": Case("Opacus clips each example's gradient", optimizer=of_opacus),
    "parts as plain tensors": Case("tensor parallelism of transformers before 5.17 is not supported", plain_parts),
    "LBFGS": Case("LBFGS needs several gradients", optimizer=lambda net: torch.optim.LBFGS(net.parameters())),
    "maximize": Case("the optimizer has maximize=True", optimizer=lambda net: sgd(net, maximize=True)),
    "a merged adapter": Case("the adapter is merged into its base", merged),
    "DeepSpeed": Case("DeepSpeed's Engine is not supported: use one device", lambda: of_library("deepspeed")),
    "Megatron": Case("Megatron is not supported", lambda: of_library("megatron")),
    "DataParallel": Case("DataParallel is not supported", lambda: nn.DataParallel(make_net())),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", METHODS)
def test_what_can_not_work_is_refused_by_name(name: str, what: str) -> None:
    case = REFUSED[what]
    model = case.model()
    with pytest.raises(MisconfigurationException) as caught:
        getattr(loops, name)(model, case.optimizer(model), case.rho, **case.settings)
    assert str(caught.value).startswith(f"{name}: ")
    assert case.words in str(caught.value)
    assert_no_trace(model)


def test_megatron_that_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = types.SimpleNamespace(model_parallel_is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)  # type: ignore[arg-type]
    net = make_net()
    with pytest.raises(MisconfigurationException, match="Megatron is not supported"):
        loops.EFMLoRA(net, sgd(net), 0.3)


@pytest.mark.parametrize("width", [4, 400])
def test_the_start_names_what_is_perturbed_and_what_is_not(width: int, caplog: pytest.LogCaptureFixture) -> None:
    """In a log line, or in a warning if much of what is trained is not perturbed."""
    net = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(width, width)})
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["small", "large"]))
    model.base_model.model["small"].scaling["default"] = 0.0
    share = 8 / (8 + 2 * width)
    line = (
        "EFMLoRA leaves unperturbed: its scaling is 0, so no perturbation of B moves its weight (1 in all, first "
        f"base_model.model.small.lora_B.default.weight); in all {share:.1%} of the adapters' trained parameters"
    )
    warns = pytest.warns(UserWarning, match=re.escape(line)) if width == 4 else nullcontext()
    with warns, caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        loops.EFMLoRA(model, sgd(model), 0.3).close()
    assert (line in caplog.text) == (width == 400)
    assert "EFMLoRA: 1 LoRA pairs of rank 2, rho=0.3, start_step=0, every_n_steps=1" in caplog.text


# -- before a step


def backward(net: nn.Module) -> None:
    loss(net, batches()[0]).backward()


@pytest.mark.parametrize("name", METHODS)
def test_opacus_around_a_model_that_has_a_method_is_refused_before_a_step(name: str) -> None:
    """It gathers each example's gradient on the parameters, of both passes together."""
    flat, net, optimizer = started(name)
    for parameter in net.parameters():
        parameter.grad_sample = None  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=f"{name}: Opacus clips each example's gradient"):
        run(flat, net, optimizer, batches()[:1])


@pytest.mark.parametrize("steps_before", [0, 1])
def test_fmlora_without_its_passes_is_refused(steps_before: int) -> None:
    flat, net, optimizer = started("FMLoRA")
    run(flat, net, optimizer, batches()[:steps_before])
    backward(net)
    before = weights(net)
    with pytest.raises(RuntimeError, match=r"about to step without FMLoRA's passes: .*flat.close\(\)"):
        optimizer.step()
    assert same(weights(net), before)
    # After the end there is no check.
    flat.close()
    optimizer.step()
    assert flat.step == steps_before


def test_fmloras_first_pass_alone_is_refused() -> None:
    flat, net, optimizer = started("FMLoRA")
    passes = flat.training_passes()
    next(passes)
    with pytest.raises(RuntimeError, match="the first pass has not run"):
        next(passes)
    with next(iter(flat.training_passes())):
        backward(net)
    with pytest.raises(RuntimeError, match="after the first of two passes, which leaves no gradient"):
        optimizer.step()
    # Nothing is left behind, and the batch can start again with its first pass.
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[:2])
    assert flat.step == 2


def test_a_batch_that_failed_before_its_first_pass_does_not_count() -> None:
    flat, net, optimizer = started("FMLoRA")
    next(flat.training_passes())  # and then, for example, the batch can't be moved to the device
    backward(net)
    with pytest.raises(RuntimeError, match="about to step without FMLoRA's passes"):
        optimizer.step()


def test_a_first_pass_without_any_gradient_is_told() -> None:
    flat, net, _ = started("FMLoRA")

    def backward_outside() -> None:
        for each_pass in flat.training_passes():
            with each_pass:
                value = loss(net, batches()[0])
            value.backward()

    with pytest.warns(UserWarning, match="the first pass left no gradient, so E is 0"):
        backward_outside()


def test_training_in_eval_mode_is_refused() -> None:
    """The layers would silently read the clean weights."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    net.eval()
    backward(net)
    with pytest.raises(RuntimeError, match=r"3 LoRA factors, .* in eval mode, call model.train\(\)"):
        optimizer.step()
    net.train()
    # Only a part of the model, such as a tower that was loaded in eval mode.
    first = next(layer for layer in net.modules() if hasattr(layer, "lora_B"))
    first.eval()
    optimizer.zero_grad()
    backward(net)
    with pytest.raises(RuntimeError, match=r"1 LoRA factors, .* in eval mode, call"):
        optimizer.step()
    optimizer.zero_grad()
    # Single layers may be in eval mode, and so may the whole model for an evaluation between steps.
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    run(flat, net, optimizer, batches()[:1])
    assert flat.step == 3


def test_a_loop_that_steps_another_optimizer_is_warned_of() -> None:
    """For example, one that a trainer creates: it would train plain LoRA, or at the last Ê."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:1])
    other = optimizer_of(net)
    few = batches()[:1] * (PASSES_UNTIL_WARNING - 1)
    run(None, net, other, few)
    with pytest.warns(UserWarning, match="without a step of the optimizer that EFMLoRA or FMLoRA was made with"):
        run(None, net, other, few[:1])
    # A step of the right one resets the count.
    run(flat, net, optimizer, few[:1])
    run(None, net, other, few)
    assert flat.step == 2


def test_two_models_of_one_optimizer_are_refused() -> None:
    """Their states would have the same place in its state dict."""
    first, second = net_of(), net_of()
    optimizer = optimizer_of(nn.ModuleList([first, second]))
    flat = method_of("EFMLoRA", first, optimizer, 0.3)
    with pytest.raises(MisconfigurationException, match="the optimizer has another EFMLoRA"):
        method_of("EFMLoRA", second, optimizer, 0.3)
    assert_no_trace(second)
    flat.close()
    method_of("EFMLoRA", second, optimizer, 0.3)
