"""Training loops without a Trainer, and the same runs with Lightning's."""

from collections.abc import Callable
from typing import Any

import torch
from float64_runs import BETA, RHO, dataset, loss, network, optimizer_of, scheduler_of
from helpers import calling
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import CosineRho, loops

METHODS = ("EFMLoRA", "FMLoRA")
SIZE, BATCHES = 4, 10  # not a multiple of the accumulation window, so the last one is shorter


def batches(dtype: torch.dtype = torch.float64, size: int = SIZE) -> list[Any]:
    x, y = dataset().tensors
    data = TensorDataset(x.to(dtype), y)
    return list(DataLoader(data, batch_size=size))[:BATCHES]


def net_of(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    net = network().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and dropout:
            module.lora_dropout["default"] = nn.Dropout(dropout)
    return net


def schedule() -> CosineRho:
    return CosineRho(RHO, 0.1, total_steps=20)


def method_of(name: str, model: nn.Module, optimizer: Any, rho: Any = None, **settings: Any) -> Any:
    own = {"beta": BETA} if name == "EFMLoRA" else {}
    return getattr(loops, name)(model, optimizer, schedule() if rho is None else rho, **own, **settings)


def started(name: str, rho: Any = 0.3) -> tuple[Any, Any, torch.optim.Optimizer]:
    """A method's object, its network and its optimizer."""
    net = net_of()
    optimizer = optimizer_of(net)
    return method_of(name, net, optimizer, rho), net, optimizer


def trained_plainly(name: str, data: list[Any], rho: Any = 0.3, **settings: Any) -> nn.Module:
    """The network after a loop in plain PyTorch."""
    flat, net, optimizer = started(name, rho)
    run(flat, net, optimizer, data, **settings)
    return net


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def run(
    flat: Any,
    model: nn.Module,
    optimizer: Any,
    data: list[Any],
    *,
    window: int = 1,
    clip: float | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = loss,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    no_sync: Callable[[bool], Any] | None = None,
    scheduler: Any = None,
    after_step: Callable[[int], Any] | None = None,
) -> None:
    """The loop as Lightning's Trainer runs it. With EFMLoRA it is plain LoRA's loop, for which ``flat`` is None."""
    for index, batch in enumerate(data):
        torch.manual_seed(index)
        steps = (index + 1) % window == 0 or index == len(data) - 1
        for each_pass in flat.training_passes() if isinstance(flat, loops.FMLoRA) else one_pass():
            with each_pass, torch.enable_grad() if no_sync is None else no_sync(not steps):
                backward(loss(model, batch) / window)
        if not steps:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if after_step is not None:
            after_step(index)


def seeds() -> Callback:
    """Seeds each batch as :func:`run` does."""
    return calling(on_train_batch_start=lambda trainer, module, batch, batch_idx: torch.manual_seed(batch_idx))


def one_pass() -> list[Any]:
    return [torch.enable_grad()]


def train(
    name: str, net: nn.Module, data: list[Any], rho: Any = None, method: dict[str, Any] | None = None, **settings: Any
) -> Any:
    """Train in plain PyTorch; returns the method's object."""
    optimizer = optimizer_of(net)
    flat = method_of(name, net, optimizer, rho, **(method or {}))
    run(flat, net, optimizer, data, scheduler=scheduler_of(optimizer), **settings)
    flat.close()
    return flat
