"""Runs that have to be refused on every rank before their first step."""

import os
from typing import Any

import torch
from fits import Sharded, ShardedAutomatic, parts
from float64_runs import RHO, dataset, fit_in_float64, network
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from strategies import strategy_of
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

from lightning_flatlora import EFMLoRA


class ByHand(ShardedAutomatic):
    """A user's own manual optimization."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False


class Split(ShardedAutomatic):
    """Tensor parallelism over the rows of a B."""

    def configure_model(self) -> None:
        if not getattr(self, "is_split", False):
            layer = self.net.base_model.model[0]
            parallelize_module(layer, self.device_mesh["tensor_parallel"], {"lora_B.default": ColwiseParallel()})
            self.is_split = True


def refused(
    strategy: str,
    front_end: str,
    strategy_settings: dict[str, Any] | None = None,
    scheduled: dict[str, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The refusal's message, and how many steps came before it.

    Args:
        strategy: as in strategy_of, or "tensor-parallel".
        front_end: as in parts, or "EFMLoRA by hand".

        strategy_settings: of the strategy.
        scheduled: batches of a step by epoch, for a GradientAccumulationScheduler.
        settings: of the front end.
    """
    net = network().float()
    if front_end == "EFMLoRA by hand":
        module, callbacks, trainer = ByHand(net), [EFMLoRA(RHO)], {}
    else:
        module, callbacks, trainer = parts(front_end, net, accumulate=1, **settings)
    if strategy == "tensor-parallel":
        used: Any = ModelParallelStrategy(process_group_backend="gloo", **(strategy_settings or {}))
        module.__class__ = Split
    else:
        used = strategy_of(strategy, **(strategy_settings or {}))
    if scheduled:
        callbacks.append(GradientAccumulationScheduler({int(epoch): size for epoch, size in scheduled.items()}))
    steps = []
    module.on_before_batch_transfer = lambda batch, index: steps.append(index) or batch
    x, y = dataset().tensors
    loader = Sharded(TensorDataset(x.float(), y), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    trainer |= {"strategy": used, "devices": 2, "use_distributed_sampler": False, "precision": "32-true"}
    try:
        fit_in_float64(module, 1, callbacks, loader, **trainer)
    except MisconfigurationException as error:
        return {"message": str(error), "steps": len(steps)}
    raise AssertionError("it was not refused")
