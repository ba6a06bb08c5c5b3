"""LoRA on a frozen base of 4 or 8 bits, through peft's own layers: only B is perturbed, which stays in float32."""

from typing import Any

import pytest
import torch
from float64_runs import Automatic, Manual, fit_in_float64, loss, optimizer_of, scheduler_of, trained
from quantized_bases import BASES, CLASSES, FEATURES, network
from reference import Reference, ascent, perturbations
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA, find_pairs

RHO, BETA = 0.5, 0.7
BATCHES, SIZE = 20, 8


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCHES * SIZE, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (BATCHES * SIZE,), generator=generator))


def loader() -> "DataLoader[Any]":
    return DataLoader(dataset(), batch_size=SIZE)


class WideReference(Reference):
    """The literal method on float32 weights, with its dense algebra in float64."""

    def fresh(self) -> list[Tensor]:
        ascents = []
        for A, B, s in self.pairs:
            factors = (tensor.double() for tensor in (A.data, B.data, A.grad, B.grad))
            ascents.append(ascent(*factors, s, "average"))
        return [E.float() for E in perturbations(ascents, self.rho(self.step), "global")]


def reference(quantize: Any, rho: float, beta: float | None) -> nn.Module:
    net = network(quantize)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(net).pairs]
    optimizer = optimizer_of(net)
    run = WideReference(net, pairs, loss, optimizer, lambda step: rho, beta=beta, scheduler=scheduler_of(optimizer))
    run.train(list(loader()))
    return net


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - trained(other)[name]).abs().max()) for name, p in trained(one).items())


def stored_base(net: nn.Module) -> list[Tensor]:
    """Copies of the frozen weights as they are stored."""
    layers = [module.base_layer.weight for module in net.modules() if hasattr(module, "base_layer")]
    return [weight.detach().clone() for weight in layers]


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_training_equals_the_literal_algorithm(quantize: Any, front_end: str) -> None:
    net = network(quantize)
    base = stored_base(net)
    assert all(weight.dtype in (torch.uint8, torch.int8) for weight in base)
    assert not find_pairs(net).left_out
    if front_end == "FMLoRAModule":
        module: Any = Manual(net, rho=RHO)
        callbacks = []
    else:
        module = Automatic(net)
        callbacks = [EFMLoRA(RHO, beta=BETA) if front_end == "EFMLoRA" else FMLoRA(RHO)]
    fit_in_float64(module, 1, callbacks, loader(), precision="32-true")
    driver = callbacks[0] if callbacks else module._callback
    assert all((E != 0).any() for E in driver.perturbation.state_dict()["E"].values())
    beta = BETA if front_end == "EFMLoRA" else None
    assert difference(net, reference(quantize, RHO, beta)) < 1e-5
    assert difference(net, reference(quantize, 0.0, beta)) > 1e-3
    assert all(torch.equal(now, before) for now, before in zip(stored_base(net), base, strict=True))
