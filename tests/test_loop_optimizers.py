"""Loops with optimizers that wrap others, have more parameters later, or step more than once."""

import copy
import logging
from typing import Any

import pytest
import torch
from float64_runs import optimizer_of
from helpers import same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import batches, loss, method_of, net_of, run, started
from pytorch_optimizer import TRAC, Lookahead, OrthoGrad, ScheduleFreeWrapper
from torch import nn

from lightning_flatlora import EFMLoRA, LearningRateRho


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


# -- wrappers


class StepsTwice(torch.optim.AdamW):
    """Steps within its step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], lr=1e-2)

    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().step()


WRAPPERS = {
    "StepsTwice": StepsTwice,
    "Lookahead": lambda inner: Lookahead(inner, k=2),
    "OrthoGrad": OrthoGrad,
    "TRAC": TRAC,
    "ScheduleFree": ScheduleFreeWrapper,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gradients_of_a_wrapper_are_those_before_its_step(name: str) -> None:
    """OrthoGrad changes them in its step; under Lightning's Trainer too the callback comes before."""
    net = net_of()
    optimizer = WRAPPERS[name](optimizer_of(net))
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    seen = []
    original = flat.method.use_gradients

    def use_gradients(also_finite: Any) -> None:
        seen.append([parameter.grad.clone() for parameter in trained(net)])
        original(also_finite)

    flat.method.use_gradients = use_gradients
    if name == "ScheduleFree":
        optimizer.train()
    for batch in batches()[:4]:
        loss(net, batch).backward()
        before = [parameter.grad.clone() for parameter in trained(net)]
        optimizer.step()
        optimizer.zero_grad()
        assert same(seen[-1], before)
    assert (flat.step, len(seen)) == (4, 4)
    # The state is in that of the inner optimizer, which each of them carries.
    state = copy.deepcopy(optimizer.state_dict())
    run(flat, net, optimizer, batches()[4:5])
    if name in ("Lookahead", "OrthoGrad"):
        optimizer.load_state_dict(state)
        assert flat.step == 4


# -- steps within steps


class Fails(torch.optim.AdamW):
    """As one that runs out of memory for its first moments."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise torch.OutOfMemoryError
        return super().step(closure)


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_after_a_step_that_raised_the_next_one_counts(name: str) -> None:
    net = net_of()
    optimizer = Fails(trained(net), lr=1e-2)
    flat = method_of(name, net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:2])
    optimizer.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        run(flat, net, optimizer, batches()[2:3])
    optimizer.fails = False
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[3:5])
    assert flat.step == 5


# -- parameters that come later


def last_layer_and_others(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parts[".4." not in name].append(parameter)
    return parts


def test_pairs_that_the_optimizer_lacks_are_named_and_perturbed_once_they_join_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in gradual unfreezing."""
    net = net_of()
    of_last, others = last_layer_and_others(net)
    optimizer = torch.optim.AdamW(of_last, lr=1e-2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        flat = method_of("EFMLoRA", net, optimizer, 0.3)
    assert "EFMLoRA leaves unperturbed: 2 pairs that the optimizer lacks, as base_model.model.0.lora_B" in caplog.text
    run(flat, net, optimizer, batches()[:2])
    before = flat.state_dict()["perturbation"]["E"]
    assert len(before) == 1
    optimizer.add_param_group({"params": others})
    flat.look_again()
    run(flat, net, optimizer, batches()[2:3])
    after = flat.state_dict()["perturbation"]["E"]
    assert len(after) == 3
    assert all(E.any() for E in after.values())
    run(flat, net, optimizer, batches()[3:])
    assert flat.step == len(batches())


def test_a_rate_that_can_not_be_followed_any_more_is_warned_of() -> None:
    net = net_of()
    of_last, others = last_layer_and_others(net)
    optimizer = torch.optim.AdamW(of_last, lr=1e-2)
    flat = method_of("EFMLoRA", net, optimizer, LearningRateRho(0.3))
    run(flat, net, optimizer, batches()[:2])
    optimizer.add_param_group({"params": others, "lr": 1e-3})
    with pytest.warns(UserWarning, match=r"several parameter groups: .* Until then the first group's is followed"):
        flat.look_again()
    run(flat, net, optimizer, batches()[2:])
    assert (flat.step, len(flat.method.pairs)) == (len(batches()), 3)


# -- states


def test_an_optimizer_with_a_state_from_the_start_is_no_late_one() -> None:
    net = net_of()
    optimizer = torch.optim.Adagrad(trained(net), lr=0.1)
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:3])
    assert flat.step == 3


def test_a_foreign_state_is_refused_in_words() -> None:
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    for state in ({"lr": 0.1}, {"step": 2}, {**flat.state_dict(), "perturbation": {"F": {}}}):
        with pytest.raises(MisconfigurationException, match="the state is not one that EFMLoRA has saved"):
            flat.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match="the state is not one that EFMLoRA has saved"):
        EFMLoRA(0.3).per_optimizer.load_state_dict({"lr": 0.1})
    assert flat.step == 2
