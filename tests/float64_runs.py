"""A network, data and modules in float64, trained by the package and by the literal loops of reference.py."""

from typing import Any

import lightning as L
import torch
from helpers import trainer_of
from peft import LoraConfig, get_peft_model
from reference import Reference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import FMLoRAModule, find_pairs

RHO, BETA = 0.4, 0.7
BATCHES, SIZE = 26, 4  # 26 is not a multiple of 4, so the last accumulation window is shorter


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2", "4"], modules_to_save=["6"])
    return get_peft_model(nn.Sequential(*layers), config).double()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCHES * SIZE, 6, generator=generator)  # float32 values, since FSDP1's plugin casts the inputs
    return TensorDataset(x.double(), torch.randint(0, 3, (BATCHES * SIZE,), generator=generator))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)


class _Learner:
    """What both modules share: the network, and AdamW under a cosine schedule stepped at each optimizer step."""

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.net)
        return [optimizer], [{"scheduler": scheduler_of(optimizer), "interval": "step"}]


class Automatic(_Learner, L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self.net, batch)


class Manual(_Learner, FMLoRAModule):
    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net

    def compute_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self.net, batch)


def fit_in_float64(
    module: L.LightningModule,
    epochs: int,
    callbacks: list[L.Callback],
    loader: Any = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> None:
    """Train on the batches above in a fixed order; other settings go to the Trainer."""
    loader = DataLoader(dataset(), batch_size=SIZE) if loader is None else loader
    settings = {"max_epochs": epochs, "precision": "64-true", **settings}
    trainer_of(None, callbacks, **settings).fit(module, loader, ckpt_path=ckpt_path)


def reference(epochs: int, **settings: Any) -> nn.Module:
    model = network()
    optimizer = optimizer_of(model)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(model).pairs]
    settings = {"loss": loss, "rho": lambda step: RHO, "scheduler": scheduler_of(optimizer), **settings}
    run = Reference(model, pairs, optimizer=optimizer, **settings)
    batches = list(DataLoader(dataset(), batch_size=SIZE))
    for _ in range(epochs):
        run.train(batches)
    assert run.step >= 100
    return model


def trained(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def worst_difference(one: nn.Module, other: nn.Module) -> float:
    others = dict(other.named_parameters())
    return max(float((p - others[name]).detach().abs().max()) for name, p in one.named_parameters())
