"""Losses whose sharpness is known in closed form: half the squared distance of a layer's weight from a target."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import LoRAPair, Perturbation, find_pairs, perturbed_read

RHO = 0.3


class Quadratic:
    """L = 1/2 sum_layers ||W_l - T_l||^2 over peft layers, in float64; W is read through the layers' own forward.

    Attributes:
        model: a peft model, with a layer of each size.
        pairs: the model's pairs.
    """

    def __init__(self, sizes: tuple[tuple[int, int], ...] = ((5, 4), (5, 4), (3, 6)), rank: int = 2) -> None:
        torch.manual_seed(0)
        layers = {f"layer{i}": nn.Linear(m, n, bias=False) for i, (n, m) in enumerate(sizes)}
        config = LoraConfig(r=rank, lora_alpha=3, target_modules=list(layers))
        self.model = get_peft_model(nn.ModuleDict(layers), config).double()  # type: ignore[arg-type]
        self.pairs = find_pairs(self.model).pairs
        for pair in self.pairs:
            nn.init.normal_(pair.B, std=0.5)
        self.layers: list[Any] = [self.model.base_model.model[name] for name in layers]  # type: ignore[index]
        self.targets = [torch.randn(n, m, dtype=torch.float64) for n, m in sizes]

    def loss(self) -> Tensor:
        weights = [layer(torch.eye(layer.in_features, dtype=torch.float64)).mT for layer in self.layers]
        return torch.stack([(W - T).square().sum() / 2 for W, T in zip(weights, self.targets, strict=True)]).sum()

    def weights(self) -> list[Tensor]:
        """W0 + s B A, dense."""
        return [
            layer.base_layer.weight.detach() + pair.scaling * pair.B.detach() @ pair.A.detach()
            for layer, pair in zip(self.layers, self.pairs, strict=True)
        ]

    def dense_loss(self, moves: list[Tensor]) -> Tensor:
        """The loss after each W is moved by a dense matrix."""
        parts = zip(self.weights(), moves, self.targets, strict=True)
        return torch.stack([(W + move - T).square().sum() / 2 for W, move, T in parts]).sum()

    def gradients(self) -> list[Tensor]:
        """G = W - T, dense."""
        return [W - T for W, T in zip(self.weights(), self.targets, strict=True)]


def all_shown(pairs: list[LoRAPair]) -> list[Tensor | None]:
    """What each reader adds to its weight now."""
    shown = []
    for pair in pairs:
        shown += [perturbed_read.shown(reader) for reader in pair.readers]
    return shown


def state_of(model: nn.Module, pairs: list[LoRAPair]) -> Callable[[], None]:
    """Remember the state that an instrument must not change.

    Returns:
        A function that asserts that it is unchanged.
    """
    parameters = list(model.parameters())
    data = [(p.data_ptr(), p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
    classes = [(type(module), dict(module.__dict__)) for module in model.modules()]
    shown = all_shown(pairs)
    random = torch.get_rng_state()

    def check() -> None:
        for p, (pointer, value, grad, grad_value) in zip(parameters, data, strict=True):
            assert p.data_ptr() == pointer
            assert p.detach().equal(value)
            assert p.grad is grad
            assert grad is None or grad.equal(grad_value)
        for module, (kind, attributes) in zip(model.modules(), classes, strict=True):
            assert type(module) is kind
            assert module.__dict__.keys() == attributes.keys()
        assert all(a is b for a, b in zip(all_shown(pairs), shown, strict=True))
        assert torch.get_rng_state().equal(random)

    return check


def average_of(pairs: list[LoRAPair], loss: Callable[[], Tensor], norm_scope: Any = "global") -> Perturbation:
    """A Perturbation whose Ê was taken at earlier weights."""
    perturbation = Perturbation(pairs, norm_scope=norm_scope)
    with torch.no_grad():
        for pair in pairs:
            pair.B.add_(0.3)
    loss().backward()
    perturbation.average(perturbation.ascend(RHO, at_perturbed=False), beta=0.9)
    with torch.no_grad():
        for pair in pairs:
            pair.B.sub_(0.3)
            pair.A.grad = pair.B.grad = None
    return perturbation
