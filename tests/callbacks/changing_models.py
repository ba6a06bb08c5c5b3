"""Callbacks that change a model in the middle of a fit, and what shows which layers are perturbed."""

from typing import Any

import torch
from helpers import make_net
from lightning.pytorch import Callback
from peft import LoraConfig
from torch import nn


class At(Callback):
    """Changes the model at the start of one batch, counted over the whole fit."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change, self.seen = step, change, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.seen == self.step:
            self.change(pl_module)
        self.seen += 1


def moved(module: nn.Module) -> list[str]:
    """The adapters and layers that read another weight than the stored one at this moment."""
    names = []
    for name, part in module.named_modules():
        if ".lora_B." in name and not torch.equal(part.weight, part._parameters["weight"]):
            names.append(".".join(name.split(".")[-3::2]))
    return names


def two_adapters() -> Any:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"]))
    return net
