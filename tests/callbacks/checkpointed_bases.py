"""A frozen base with a head and an adapter, and the files that an AdapterCheckpoint writes of it."""

from pathlib import Path
from typing import Any

import torch
from helpers import CLASSES, FEATURES, WIDTH, Classifier
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import AdapterCheckpoint

HEAD = "net.base_model.model.head.weight"


class Base(nn.Module):
    """A body that LoRA adapts, and a head that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(3000))
        self.register_buffer("codes", torch.zeros(4))
        self.register_buffer("never", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.ema.data[2000] += 1
            self.codes = self.codes + 1
        return self.head(torch.tanh(self.first(x)))


def network(head_seed: int = 0) -> Any:
    torch.manual_seed(0)
    base = Base()
    torch.manual_seed(head_seed)
    nn.init.normal_(base.head.weight)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))


def module_of(head_seed: int = 0, **kwargs: Any) -> Classifier:
    return Classifier(net=network(head_seed), **kwargs)


def saver(folder: Path, **kwargs: Any) -> AdapterCheckpoint:
    settings = {"save_top_k": -1, "every_n_train_steps": 3, "filename": "{step}", **kwargs}
    return AdapterCheckpoint(folder, **settings)


def state(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)["state_dict"]
