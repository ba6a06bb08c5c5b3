"""LoRA on a frozen base of 4 or 8 bits, through peft's own layers: what is perturbed is B, which stays in float32."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import Reference, ascent, perturbations
from test_exactness import Automatic, Manual, fit, loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA, Perturbation, find_pairs

RHO, BETA = 0.5, 0.7
FEATURES, WIDTH, CLASSES = 32, 64, 3
BATCHES, SIZE = 20, 8


def four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def eight_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


BASES = [four_bits, eight_bits]
LAYERS = {four_bits: "Linear4bit", eight_bits: "Linear8bitLt"}


def network(quantize: Any) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    net = nn.Sequential(*layers)
    net[0], net[2] = quantize(net[0]), quantize(net[2])
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = quantize is four_bits, quantize is eight_bits  # as transformers says
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], modules_to_save=["4"])
    return get_peft_model(net, config)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCHES * SIZE, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (BATCHES * SIZE,), generator=generator))


def loader() -> "DataLoader[Any]":
    return DataLoader(dataset(), batch_size=SIZE)


class _PlainAdamW:
    net: nn.Module

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net)


class QuantizedAutomatic(_PlainAdamW, Automatic):
    """Automatic optimization."""


class QuantizedManual(_PlainAdamW, Manual):
    """FMLoRAModule."""


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)


class WideReference(Reference):
    """The literal method on weights in float32, its dense algebra in float64."""

    def fresh(self) -> list[Tensor]:
        wide = [(A.data, B.data, A.grad, B.grad) for A, B, _ in self.pairs]
        factors = [[tensor.double() for tensor in four] for four in wide]
        ascents = [ascent(*four, s, "average") for four, (_, _, s) in zip(factors, self.pairs, strict=True)]
        return [E.float() for E in perturbations(ascents, self.rho(self.step), "global")]


def reference(quantize: Any, rho: float, beta: float | None) -> nn.Module:
    net = network(quantize)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(net).pairs]
    WideReference(net, pairs, loss, optimizer_of(net), rho=lambda step: rho, beta=beta).train(list(loader()))
    return net


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - trained(other)[name]).abs().max()) for name, p in trained(one).items())


def stored_base(net: nn.Module) -> list[Tensor]:
    """Copies of the frozen weights, as they are stored."""
    layers = [module.base_layer.weight for module in net.modules() if hasattr(module, "base_layer")]
    return [weight.detach().clone() for weight in layers]


@pytest.mark.parametrize("quantize", BASES)
def test_pairs_of_quantized_layers_are_found(quantize: Any) -> None:
    net = network(quantize)
    kinds = [type(module).__name__ for module in net.modules() if hasattr(module, "lora_B")]
    assert kinds == [LAYERS[quantize]] * 2
    assert all(weight.dtype in (torch.uint8, torch.int8) for weight in stored_base(net))
    search = find_pairs(net)
    assert [pair.B.dtype for pair in search.pairs] == [torch.float32] * 2
    assert not search.left_out


@pytest.mark.parametrize("quantize", BASES)
def test_what_the_layers_read_is_a_moved_B_bit_for_bit(quantize: Any) -> None:
    """Loss and every gradient."""
    net = network(quantize)
    batch = next(iter(loader()))
    loss(net, batch).backward()
    search = find_pairs(net)
    perturbation = Perturbation(search.pairs)
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    E = perturbation.state_dict()["E"]

    def loss_and_gradients() -> list[Tensor]:
        net.zero_grad()
        value = loss(net, batch)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    clean = loss_and_gradients()
    with perturbation.applied():
        read = loss_and_gradients()
    perturbation.uninstall()
    for pair in search.pairs:
        pair.B.data += E[pair.name]
    moved = loss_and_gradients()
    assert len(read) == 1 + 2 * 2 + 2
    assert all(torch.equal(one, other) for one, other in zip(read, moved, strict=True))
    assert not torch.equal(read[0], clean[0])


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_training_equals_the_literal_algorithm(quantize: Any, front_end: str) -> None:
    net = network(quantize)
    base = stored_base(net)
    if front_end == "FMLoRAModule":
        module: Any = QuantizedManual(net, rho=RHO)
        callbacks = []
    else:
        module = QuantizedAutomatic(net)
        callbacks = [EFMLoRA(RHO, beta=BETA) if front_end == "EFMLoRA" else FMLoRA(RHO)]
    fit(module, 1, callbacks, loader(), precision="32-true")
    driver = callbacks[0] if callbacks else module._driver
    assert all((E != 0).any() for E in driver.perturbation.state_dict()["E"].values())
    beta = BETA if front_end == "EFMLoRA" else None
    assert difference(net, reference(quantize, RHO, beta)) < 1e-5
    assert difference(net, reference(quantize, 0.0, beta)) > 1e-3
    assert all(torch.equal(now, before) for now, before in zip(stored_base(net), base, strict=True))
