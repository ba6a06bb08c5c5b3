"""Mistakes in a loop of one's own that would leave nothing perturbed, or the wrong thing."""

import logging

import pytest
import torch
from float64_runs import optimizer_of
from loop_runs import batches, method_of, net_of, run
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import loops
from lightning_flatlora.lightning_names import MisconfigurationException


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_a_closed_object_is_not_used_again(name: str) -> None:
    def take_passes() -> None:
        for each_pass in flat.training_passes():
            with each_pass:
                pass

    net = net_of()
    flat = method_of(name, net, optimizer_of(net), 0.3)
    flat.close()
    with pytest.raises(RuntimeError, match=rf"close\(\) has ended this {name}: make a new one"):
        take_passes()


def test_a_first_pass_without_any_gradient_is_told() -> None:
    """As of an object that was made for another model, or a backward that stands outside of the passes."""
    net = net_of()
    flat = loops.FMLoRA(net, optimizer_of(net), 0.3)
    x, y = batches()[0]

    def backward_outside() -> None:
        for each_pass in flat.training_passes():
            with each_pass:
                loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()

    with pytest.warns(UserWarning, match="the first pass left no gradient, so E is 0"):
        backward_outside()
    flat.close()


def test_an_optimizer_that_maximizes_is_refused() -> None:
    net = net_of()
    with pytest.raises(MisconfigurationException, match="the optimizer has maximize=True"):
        loops.EFMLoRA(net, torch.optim.SGD(net.parameters(), lr=0.1, maximize=True), 0.3)


def test_layers_that_stay_unperturbed_are_named(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "inner": nn.Linear(4, 4)})
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["embedding", "inner"]))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        loops.EFMLoRA(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.3).close()
    assert "EFMLoRA leaves unperturbed: Embedding: embedding LoRA keeps bare parameters" in caplog.text


def step_without_the_method(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = batches()[0]
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_step_without_a_pass_and_before_step_is_refused(name: str, steps_before: int) -> None:
    net = net_of()
    optimizer = optimizer_of(net)
    flat = method_of(name, net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:steps_before])
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match=rf"about to step without {name}'s before_step: .*flat.close\(\)"):
        step_without_the_method(net, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    # After the end nobody asks.
    flat.close()
    step_without_the_method(net, optimizer)
    assert flat.step == steps_before


def test_a_step_after_the_first_of_two_passes_is_refused() -> None:
    net = net_of()
    optimizer = optimizer_of(net)
    flat = loops.FMLoRA(net, optimizer, 0.3)
    x, y = batches()[0]
    with next(iter(flat.training_passes())):
        nn.functional.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError, match="came after the first of two passes, which leaves no gradient"):
        flat.before_step()
    # Nothing is left behind: the batch is tried again from its first pass.
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[:2])
    assert flat.step == 2
    flat.close()


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_a_model_and_an_optimizer_in_each_others_place_are_named(name: str) -> None:
    net = net_of()
    with pytest.raises(MisconfigurationException, match=rf"{name}: .*must be a model and its optimizer, got AdamW and"):
        method_of(name, optimizer_of(net), net, 0.3)


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_a_merged_adapter_is_refused(name: str) -> None:
    net = net_of()
    net.merge_adapter()
    with pytest.raises(
        MisconfigurationException, match=rf"{name}: the adapter is merged into its base.*unmerge_adapter"
    ):
        method_of(name, net, optimizer_of(net), 0.3)
    net.unmerge_adapter()
    method_of(name, net, optimizer_of(net), 0.3).close()
