"""The baselines by name, and a module that takes its steps by hand."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from helpers import Classifier
from torch import Tensor

from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

BASELINES: dict[str, Any] = {
    "SAM": SAM,
    "LoRASAM": LoRASAM,
    "nBAR": BalancednessRegularization,
    "oBAR": partial(BalancednessRegularization, kind="oBAR"),
    "RandomPerturbation": partial(RandomPerturbation, seed=5),
    "BiLoRA": partial(BiLoRA, step_size=0.3, seed=5),
}
"""Each is called with a size, and maybe other settings."""
SIZES: dict[str, float] = defaultdict(lambda: 0.4, nBAR=2.0, oBAR=2.0, RandomPerturbation=0.3)
"""At which a method's run is clearly another one than plain LoRA's."""

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
