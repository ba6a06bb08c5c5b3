"""The strategies under test on CPU processes, and what is sharded by each."""

import os
from typing import Any

import torch
from float64_runs import trained
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from typing_extensions import override


class FSDPOnCPU(FSDPStrategy):
    """FSDP1 on CPU processes: Lightning refuses the class itself there, and wraps with a device index."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            **self.kwargs,
        )


class DoubleFSDP(FSDPPrecision):
    """float64 under FSDP1, for which Lightning has no name."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._desired_input_dtype = torch.float64

    @property
    @override
    def mixed_precision_config(self) -> None:  # type: ignore[override]
        return None


WRAPPING = {
    "root": None,  # one unit for all
    "layers": ModuleWrapPolicy({LoraLayer}),
    "linears": ModuleWrapPolicy({nn.Linear}),  # each factor alone, as peft's own policy does
}


def places() -> dict[str, Any]:
    """Where a Trainer's ranks are, by torchrun's variables; each rank's loader has only its own samples."""
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    return {"devices": devices, "num_nodes": nodes, "use_distributed_sampler": False}


def strategy_of(name: str, **settings: Any) -> Strategy:
    """Return a strategy for two or more CPU processes.

    Args:
        name: "ddp", "fsdp2", or "fsdp1" with an optional policy of WRAPPING after a hyphen.
        settings: of the strategy.
    """
    kind, _, policy = name.partition("-")
    settings["process_group_backend"] = "gloo"
    if kind == "ddp":
        return DDPStrategy(**settings)
    if kind == "fsdp2":
        sizes = {"data_parallel_size": int(os.environ["WORLD_SIZE"]), "tensor_parallel_size": 1}
        return ModelParallelStrategy(**{**sizes, **settings})
    return FSDPOnCPU(auto_wrap_policy=WRAPPING[policy or "layers"], **settings)


def in_float64(strategy: str, **settings: Any) -> dict[str, Any]:
    """Return what a Trainer gets to fit in float64 under a strategy of :func:`strategy_of`."""
    precision: dict[str, str | None] = {"ddp": "64-true", "fsdp2": "32-true"}  # the latter leaves the weights' dtype
    if strategy.startswith("fsdp1"):
        settings["precision_plugin"] = DoubleFSDP()
    kind = strategy.partition("-")[0]
    return {"strategy": strategy_of(strategy, **settings), "precision": precision.get(kind), **places()}


def shard(net: nn.Module, device_mesh: Any) -> nn.Module:
    """What configure_model and Fabric do under ModelParallelStrategy: every LoRA layer a unit, then the rest."""
    mesh = device_mesh["data_parallel"]
    for layer in net.modules():
        # peft reads an expert's parameter outside of its own module, so experts must be part of a larger unit.
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def full_weights(strategy: Strategy, net: nn.Module) -> dict[str, Tensor]:
    """Every trained weight, whole, by its plain name; a collective under FSDP."""
    if isinstance(strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False):
            return {_plain(name): p.clone() for name, p in trained(net).items()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in trained(net).items()}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
