"""The baselines by name, and a module that takes its steps by hand."""

from typing import Any

import torch
from helpers import Classifier
from torch import Tensor

from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

BASELINES: dict[str, Any] = {
    "SAM": SAM,
    "LoRASAM": LoRASAM,
    "nBAR": BalancednessRegularization,
    "oBAR": lambda alpha, **settings: BalancednessRegularization(alpha, "oBAR", **settings),
    "RandomPerturbation": RandomPerturbation,
    "BiLoRA": BiLoRA,
}


TWO_PASSES = ("SAM", "LoRASAM")


class ByHand(Classifier):
    """Two optimizer steps in one training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.outputs.append(self.net(torch.ones(1, 6)).detach())
            self.manual_backward(self.loss(batch, batch_idx))
            self.optimizers().step()
