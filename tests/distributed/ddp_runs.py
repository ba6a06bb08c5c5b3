"""Runs under DDP of networks and modules of their own; each also trains alone, on one process, to be compared with."""

import os
from typing import Any

import lightning as L
import pytorch_lightning
import torch
from fits import Sharded, parts
from float64_runs import BATCHES, RHO, SIZE, Automatic, Manual, dataset, fit_in_float64, loss, network
from strategies import strategy_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_flatlora.pytorch_lightning
from lightning_flatlora import EFMLoRA, FMLoRA


def joint_batches(size: int = SIZE) -> "DataLoader[Any]":
    """What all ranks see together, in one batch."""
    return DataLoader(dataset(), batch_size=size)


def turns() -> "DataLoader[Any]":
    """What two ranks see, one rank's half of a batch after the other's."""
    order: list[int] = []
    for start in range(0, BATCHES * SIZE, SIZE):
        order += [start, start + 2, start + 1, start + 3]
    return DataLoader(dataset(), batch_size=SIZE // 2, sampler=order)  # type: ignore[arg-type]


def train_alone(
    front_end: str,
    accumulate: int = 1,
    clip: Any = None,
    epochs: int = 2,
    loader: Any = None,
    batches: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One process on the joint batches, or on a loader of its own; of an epoch on its first batches."""
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate, clip, **settings)
    loader = joint_batches() if loader is None else loader
    fit_in_float64(module, epochs, callbacks, loader, limit_train_batches=batches, **trainer)
    driver = callbacks[0] if callbacks else module._callback
    return {"weights": trained(net), "E": driver.perturbation.state_dict()["E"]}


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest in any tensor of the same name."""
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def on_two_ranks(**settings: Any) -> tuple[Any, dict[str, Any]]:
    """A rank's half of each batch, and what its Trainer needs."""
    loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    strategy = strategy_of("ddp", **settings)
    return loader, {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}


class Routed(nn.Module):
    """The second layer sees some samples only, the third none of every third batch.

    So a layer goes unused now on one rank, now on all, as with experts.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.batch_idx = 0

    def forward(self, x: Tensor) -> Tensor:
        first, _, second, _, third, _, last = self.net.base_model.model
        hidden = torch.tanh(first(x))
        chosen = x[:, 0] > 0.3
        if chosen.any():
            hidden = hidden.index_put((chosen,), torch.tanh(second(hidden[chosen])))
        if self.batch_idx % 3 != 1:
            hidden = torch.tanh(third(hidden))
        return last(hidden)  # type: ignore[no-any-return]


class RoutedAutomatic(Automatic):
    """Automatic optimization."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)


class RoutedManual(Manual):
    """FMLoRAModule."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.net.batch_idx = batch_idx
        return super().compute_loss(batch, batch_idx)


def train_routed(front_end: str, alone: bool = False) -> dict[str, Any]:
    """Layers that some batches leave out, with find_unused_parameters."""
    net = Routed(network())
    step = {"accumulate_grad_batches": 2}
    short = {"limit_train_batches": 12}
    loader, trainer = (joint_batches(), {}) if alone else on_two_ranks(find_unused_parameters=True)
    if front_end == "FMLoRAModule":
        fit_in_float64(RoutedManual(net, rho=RHO, **step), 1, [], loader, **short, **trainer)
    else:
        callback = {"EFMLoRA": EFMLoRA, "FMLoRA": FMLoRA}[front_end](RHO)
        fit_in_float64(RoutedAutomatic(net), 1, [callback], loader, **step, **short, **trainer)
    return {"weights": trained(net.net)}


class CalledOff(Automatic):
    """Ends its first epoch at a batch."""

    def __init__(self, net: nn.Module, at: int) -> None:
        super().__init__(net)
        self.at = at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == self.at else None


class Synchronizes(L.Callback):
    """Whether DDP would average the gradients of a backward, as each epoch ends."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.answers.append(getattr(trainer.strategy.model, "require_backward_grad_sync", True))


def train_called_off(alone: bool = False) -> dict[str, Any]:
    """FMLoRA with an ascent of each rank's own, which keeps DDP from synchronizing it; and a batch called off."""
    net, answers = network(), Synchronizes()
    loader, trainer = (turns(), {"accumulate_grad_batches": 2}) if alone else on_two_ranks()
    callbacks = [FMLoRA(RHO, sync_ascent=alone), answers]
    trainer["limit_train_batches"] = 12 if alone else 6
    fit_in_float64(CalledOff(net, at=6 if alone else 3), 2, callbacks, loader, **trainer)
    return {"weights": trained(net), "synchronizes": answers.answers}


class UnderTheOtherName(pytorch_lightning.LightningModule):
    """Automatic optimization, and the Trainer of pytorch_lightning."""

    configure_optimizers = Automatic.configure_optimizers

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss(self.net, batch)


def train_under_the_other_name(front_end: str, batches: int) -> dict[str, Any]:
    """As fits:train on two ranks, with a strategy, a Trainer and a callback of pytorch_lightning."""
    net, callback = network(), getattr(lightning_flatlora.pytorch_lightning, front_end)(RHO)
    loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = pytorch_lightning.strategies.DDPStrategy(process_group_backend="gloo")
    trainer = pytorch_lightning.Trainer(
        max_epochs=2,
        callbacks=[callback],
        precision="64-true",
        accelerator="cpu",
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        enable_model_summary=False,
        limit_train_batches=batches,
        **quiet,
    )
    trainer.fit(UnderTheOtherName(net), loader)
    return {"weights": trained(net), "E": callback.perturbation.state_dict()["E"]}
