"""LoRA layers of other projects, imitated in their structure, and how tests train them."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_flatlora.pairs.finders import PairsByName, litgpt_pairs, nemo_pairs, torchtune_pairs


class OfTorchtune(nn.Module):
    """Two modules without bias, scaled by alpha / rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3, requires_grad=False)
        self.rank, self.alpha = 2, 3.0
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.alpha / self.rank * self.lora_b(self.lora_a(x))


class OfNeMo(nn.Module):
    """A base with an adapter next to it, scaled by alpha / dim."""

    def __init__(self) -> None:
        super().__init__()
        self.to_wrap = nn.Linear(6, 6).requires_grad_(False)
        self.adapter = Adapter()

    def forward(self, x: Tensor) -> Tensor:
        return self.to_wrap(x) + self.adapter(x)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.alpha = 2, 3
        self.linear_in, self.linear_out = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.linear_in(x)) * (self.alpha / self.dim)


class OnHuggingFace(nn.Linear):
    """A Linear that holds its adapter itself."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.requires_grad_(False)
        self.scale = 1.5
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_b(self.lora_a(x))


class Bare(nn.Module):
    """The factors are parameters of the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaling = nn.Linear(6, 6).requires_grad_(False), 1.5
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


BY_NAME = PairsByName(a="lora_A", b="lora_B", scaling="scaling")
KINDS: list[tuple[type[nn.Module], Callable[..., Any], str]] = [
    (OfTorchtune, torchtune_pairs, "0.lora_b.weight"),
    (OfNeMo, nemo_pairs, "0.adapter.linear_out.weight"),
    (OnHuggingFace, nemo_pairs, "0.lora_b.weight"),
    (Bare, litgpt_pairs, "0.lora_B"),
    (Bare, BY_NAME, "0.lora_B"),
]


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(), nn.Tanh(), kind()).double()


def batches(number: int, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(number):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        data.append((x, x.flip(1)))
    return data


def error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class Learner(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return error(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.net)
