"""Adapters that the step itself chooses: each is estimated as it is trained."""

from typing import Any

import pytest
import torch
from changing_models import two_adapters
from helpers import FRONT_ENDS, Classifier, build, fit
from torch import nn

from lightning_flatlora import EFMLoRA, perturbed_read


class TrainsBoth:
    """An optimizer of both adapters, whichever is active."""

    def configure_optimizers(self) -> Any:
        module: Any = self
        return torch.optim.AdamW([p for name, p in module.named_parameters() if "lora" in name], lr=0.02)


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


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("first", ["default", "other"])
def test_an_adapter_that_only_the_step_activates_is_perturbed_from_its_second_step_on(
    tmp_path: Any, front_end: str, first: str
) -> None:
    net = two_adapters()
    net.set_adapter(first)
    module, callbacks, kwargs = build(front_end, net=net, own=BothInAStep)
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
