"""Runs on several processes: train with a front end under a strategy, and return what the rank ends with."""

import os
from typing import Any

import torch
from float64_runs import RHO, SIZE, Automatic, Manual, dataset, fit_in_float64, network
from strategies import full_weights, places, shard, strategy_of
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA

PRECISION_OF_FLOAT64: dict[str, tuple[str | None, dict[str, Any]]] = {
    "ddp": ("64-true", {}),
    "fsdp2": ("32-true", {}),  # it leaves the weights' dtype alone
    "fsdp1": (None, {"double": True}),
}


class Sharded(DataLoader):  # type: ignore[type-arg]
    """A rank's share of each batch, ranks taking turns on the samples: all ranks' shares make one of the full size."""

    def __init__(self, data: TensorDataset, ranks: int, rank: int, size: int = SIZE) -> None:
        sampler: Any = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
        super().__init__(data, batch_size=size // ranks, sampler=sampler)


class _ConfiguresModel:
    net: nn.Module
    device_mesh: Any

    def configure_model(self) -> None:
        if self.device_mesh is not None and not getattr(self, "is_sharded", False):
            shard(self.net, self.device_mesh)
            self.is_sharded = True


class ShardedAutomatic(_ConfiguresModel, Automatic):
    """Automatic optimization; sharded under ModelParallelStrategy."""


class ShardedManual(_ConfiguresModel, Manual):
    """FMLoRAModule; sharded under ModelParallelStrategy."""


def parts(
    front_end: str, net: nn.Module, accumulate: int, clip: tuple[float, str] | None = None, **settings: Any
) -> tuple[Any, list[Any], dict[str, Any]]:
    """A front end's module, callbacks and what the Trainer gets, with accumulation and clipping in their place."""
    step: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    if clip:
        step |= {"gradient_clip_val": clip[0], "gradient_clip_algorithm": clip[1]}
    if front_end == "FMLoRAModule":
        return ShardedManual(net, rho=RHO, **step, **settings), [], {}
    if front_end == "EFMLoRA+FMLoRAModule":
        return ShardedManual(net, rho=RHO, **step), [EFMLoRA(RHO, every_n_steps=2, **settings)], {}
    callbacks = {"LoRA": [], "EFMLoRA": [EFMLoRA], "FMLoRA": [FMLoRA]}[front_end]
    return ShardedAutomatic(net), [callback(RHO, **settings) for callback in callbacks], step


def train(
    strategy: str,
    front_end: str,
    accumulate: int = 1,
    clip: Any = None,
    precision: str | None = "32-true",
    dtype: str = "float64",
    strategy_settings: dict[str, Any] | None = None,
    epochs: int = 2,
    batches: int | None = None,
    size: int = SIZE,
    **settings: Any,
) -> dict[str, Any]:
    """Train on this rank's share of each batch, or of an epoch's first ones; the trained weights and E, whole."""
    wide = getattr(torch, dtype)
    net = network().to(wide)
    module, callbacks, trainer = parts(front_end, net, accumulate, clip, **settings)
    x, y = dataset().tensors
    loader = Sharded(TensorDataset(x.to(wide), y), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), size)
    if dtype == "float64":
        precision, double = PRECISION_OF_FLOAT64[strategy.partition("-")[0]]
        strategy_settings = {**double, **(strategy_settings or {})}
    used = strategy_of(strategy, **(strategy_settings or {}))
    trainer |= {"strategy": used, "precision": precision, "limit_train_batches": batches, **places()}
    fit_in_float64(module, epochs, callbacks, loader, **trainer)
    driver = callbacks[0] if callbacks else getattr(module, "_callback", None)
    E = driver.perturbation.state_dict()["E"] if driver else {}
    return {"weights": full_weights(used, net), "E": E}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest over tensors of the relative difference in norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - t).norm() / t.norm()) for name, t in other.items())
