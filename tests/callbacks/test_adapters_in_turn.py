"""Adapters that take turns, chosen in a hook or inside of the step: each is estimated as it is trained."""

from typing import Any

import pytest
import torch
from helpers import FEATURES, FRONT_ENDS, Classifier, TwoPassClassifier, build, fit, make_net, weights
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import EFMLoRA, Perturbation, find_pairs, loops, perturbed_read


def two_adapters() -> nn.Module:
    net = make_net()
    torch.manual_seed(1)
    net.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"]))
    return net


class TrainsBoth:
    """An optimizer of both adapters, whichever is active."""

    def configure_optimizers(self) -> Any:
        module: Any = self
        return torch.optim.AdamW([p for name, p in module.named_parameters() if "lora" in name], lr=0.02)


class InTurn(TrainsBoth):
    """The batch's number decides on the adapter, in training_step itself."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self
        module.net.set_adapter(("default", "other")[batch_idx % 2])
        return super().loss(batch, batch_idx)  # type: ignore[misc]


class Turns(InTurn, Classifier):
    pass


class TwoPassTurns(InTurn, TwoPassClassifier):
    pass


@pytest.mark.parametrize("front_end", ["efmlora", "fmlora", "module"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_estimator_is_the_one_that_was_asked_for(tmp_path: Any, front_end: str, accumulate: int) -> None:
    """Where A counted as frozen, both estimators gave the same weights bit for bit."""
    found = []
    for estimator in ("average", "projected"):
        module, callbacks, kwargs = build(
            front_end, net=two_adapters(), accumulate=accumulate, classes=(Turns, TwoPassTurns), estimator=estimator
        )
        fit(tmp_path, module, callbacks, max_epochs=4, **kwargs)
        found.append(weights(module))
    average, projected = found
    for adapter in ("default", "other"):
        names = [name for name in average if f".{adapter}." in name]
        assert names
        assert any(not torch.equal(average[name], projected[name]) for name in names), adapter


READ: list[tuple[int, str, bool]] = []  # not in the module, where both passes would count in it


class BothInAStep(TrainsBoth):
    """Activates one adapter and then the other, in training_step itself, and notes whether the layers read B + E."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self
        losses = []
        for adapter in ("default", "other"):
            module.net.set_adapter(adapter)
            losses.append(super().loss(batch, batch_idx))  # type: ignore[misc]
            reader = module.net.base_model.model[0].lora_B[adapter]
            READ.append((module.global_step, adapter, perturbed_read.shown(reader) is not None))
        # peft has frozen the first one again, and its gradient would not be kept.
        for name, parameter in module.net.named_parameters():
            parameter.requires_grad_("lora" in name)
        return losses[0] + losses[1]


class Both(BothInAStep, Classifier):
    pass


class TwoPassBoth(BothInAStep, TwoPassClassifier):
    pass


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("first", ["default", "other"])
def test_an_adapter_that_only_the_step_activates_is_perturbed_from_its_second_step_on(
    tmp_path: Any, front_end: str, first: str
) -> None:
    net = two_adapters()
    net.set_adapter(first)
    module, callbacks, kwargs = build(front_end, net=net, classes=(Both, TwoPassBoth))
    READ.clear()
    fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    perturbed = {(step, adapter) for step, adapter, is_perturbed in READ if is_perturbed}
    steps = {step for step, _, _ in READ}
    assert steps == set(range(6))
    for step in steps - {0}:
        assert {(step, "default"), (step, "other")} <= perturbed


class OneAfterTheOther(TrainsBoth, Classifier):
    """In manual optimization: a step of one adapter and then of the other, with the same batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net=net)
        self.automatic_optimization = False
        self.read: list[tuple[str, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        net: Any = self.net
        for adapter in ("default", "other"):
            net.set_adapter(adapter)
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            self.read.append((adapter, perturbed_read.shown(net.base_model.model[0].lora_B[adapter]) is not None))
            optimizer.step()


@pytest.mark.parametrize("first", ["default", "other"])
def test_adapters_may_take_turns_within_a_manual_step(tmp_path: Any, first: str) -> None:
    """The one that is never active at the start of a step was trained without a perturbation, and without a word."""
    net = two_adapters()
    net.set_adapter(first)
    module = OneAfterTheOther(net)
    fit(tmp_path, module, [EFMLoRA(0.5)])
    assert all(is_perturbed for _, is_perturbed in module.read[2:])


def test_a_loop_follows_them_too() -> None:
    found = []
    for first in ("default", "other"):
        net: Any = two_adapters().double()
        net.set_adapter(first)
        optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if "lora" in name], lr=0.1)
        flat = loops.EFMLoRA(net, optimizer, rho=0.5)
        for batch in torch.randn(5, 4, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            for adapter in ("default", "other"):
                net.set_adapter(adapter)
                net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(net))
        assert len(flat.perturbation.pairs) == 6
        assert all(float(E.norm()) > 0 for E in flat.perturbation.state_dict()["E"].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


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
