"""Fits under each strategy on several CPU processes, and on one process for comparison."""

import os
from collections import Counter
from typing import Any

import torch
from float64_runs import BATCHES, RHO, SIZE, Automatic, Manual, dataset, fit_in_float64, network, trained
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from typing_extensions import override

from lightning_flatlora import EFMLoRA, FMLoRA

# -- strategies


class FSDPOnCPU(FSDPStrategy):
    """FSDP1 on CPU processes, where Lightning refuses its own class, which wraps with a device index."""

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
    "root": None,  # one unit for everything
    "layers": ModuleWrapPolicy({LoraLayer}),
    "linears": ModuleWrapPolicy({nn.Linear}),  # each factor separately, as in peft's own policy
}


def places() -> dict[str, Any]:
    """The layout of a Trainer's ranks, from torchrun's variables; each rank's loader has only its own samples."""
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    return {"devices": devices, "num_nodes": nodes, "use_distributed_sampler": False}


def strategy_of(name: str, **settings: Any) -> Strategy:
    """Return a strategy for two or more CPU processes.

    Args:
        name: "ddp", "fsdp2", or "fsdp1" with an optional policy of WRAPPING after a hyphen.
        settings: passed to the strategy.
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
    """Return a Trainer's arguments for a fit in float64 under a strategy of :func:`strategy_of`."""
    precision: dict[str, str | None] = {"ddp": "64-true", "fsdp2": "32-true"}  # "32-true" keeps the weights' dtype
    if strategy.startswith("fsdp1"):
        settings["precision_plugin"] = DoubleFSDP()
    kind = strategy.partition("-")[0]
    return {"strategy": strategy_of(strategy, **settings), "precision": precision.get(kind), **places()}


def shard(net: nn.Module, device_mesh: Any) -> nn.Module:
    """As configure_model and Fabric do under ModelParallelStrategy: each LoRA layer is a unit, then the rest."""
    mesh = device_mesh["data_parallel"]
    for layer in net.modules():
        # peft reads an expert's parameter outside of its own module, so experts must be part of a larger unit.
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def full_weights(strategy: Strategy, net: nn.Module) -> dict[str, Tensor]:
    """All trained weights in full, by their plain names; a collective under FSDP."""
    if isinstance(strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False):
            return {_plain(name): p.clone() for name, p in trained(net).items()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in trained(net).items()}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


# -- weights


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference between tensors of the same name."""
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference in norm between tensors of the same name."""
    assert one.keys() == other.keys()
    return max(float((one[name] - t).norm() / t.norm()) for name, t in other.items())


def assert_equal_to_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any], tolerance: float = 1e-10) -> None:
    """Weights and, if there is one, E: the same bits on all ranks, close to those of one process, and not zero."""
    for part, expected in alone.items():
        assert difference(ranks[0][part], expected) < tolerance
        assert all(difference(rank[part], ranks[0][part]) == 0 for rank in ranks)
    assert all((E != 0).any() for E in alone.get("E", {}).values())


# -- batches


class Sharded(DataLoader):  # type: ignore[type-arg]
    """A rank's share of each batch; the ranks take samples in turn, so all shares together make a full-size batch."""

    def __init__(self, data: TensorDataset, ranks: int, rank: int, size: int = SIZE) -> None:
        sampler: Any = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
        super().__init__(data, batch_size=size // ranks, sampler=sampler)


def own_share(data: TensorDataset | None = None, size: int = SIZE) -> Sharded:
    """This process's share of each batch, from torchrun's variables."""
    return Sharded(data or dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), size)


def single() -> TensorDataset:
    """The data in float32."""
    x, y = dataset().tensors
    return TensorDataset(x.float(), y)


def joint_batches(size: int = SIZE) -> "DataLoader[Any]":
    """The batches of all ranks joined."""
    return DataLoader(dataset(), batch_size=size)


def turns() -> "DataLoader[Any]":
    """The batches of two ranks, one rank's half after the other's."""
    order: list[int] = []
    for start in range(0, BATCHES * SIZE, SIZE):
        order += [start, start + 2, start + 1, start + 3]
    return DataLoader(dataset(), batch_size=SIZE // 2, sampler=order)  # type: ignore[arg-type]


# -- fits


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
    """A front end's module, its callbacks and the Trainer's arguments, one of which gets accumulation and clipping."""
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
    clip: tuple[float, str] | None = None,
    precision: str = "64-true",
    strategy_settings: dict[str, Any] | None = None,
    epochs: int = 2,
    batches: int | None = None,
    size: int = SIZE,
    **settings: Any,
) -> dict[str, Any]:
    """Train on this rank's share of each batch; returns the full trained weights and E.

    Args:
        strategy: see :func:`strategy_of`.
        front_end: see :func:`parts`.
        accumulate: batches per step.
        clip: gradient_clip_val and gradient_clip_algorithm.
        precision: the Trainer's; all but "64-true" train a float32 network.
        strategy_settings: passed to the strategy.
        epochs: number of epochs.
        batches: batches per epoch, or None for all.
        size: samples per joint batch.
        settings: passed to the front end.
    """
    net, data, of_strategy = network(), dataset(), strategy_settings or {}
    if precision == "64-true":
        ranks = in_float64(strategy, **of_strategy)
    else:
        net, data = net.float(), single()
        ranks = {"strategy": strategy_of(strategy, **of_strategy), "precision": precision, **places()}
    module, callbacks, trainer = parts(front_end, net, accumulate, clip, **settings)
    trainer |= {"limit_train_batches": batches, **ranks}
    fit_in_float64(module, epochs, callbacks, own_share(data, size), **trainer)
    return {"weights": full_weights(ranks["strategy"], net), "E": E_of(module, callbacks)}


def train_alone(
    front_end: str,
    accumulate: int = 1,
    clip: tuple[float, str] | None = None,
    epochs: int = 2,
    loader: Any = None,
    batches: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Do as :func:`train` does, but in one process, on the joint batches or on the given loader."""
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate, clip, **settings)
    loader = joint_batches() if loader is None else loader
    fit_in_float64(module, epochs, callbacks, loader, limit_train_batches=batches, **trainer)
    return {"weights": trained(net), "E": E_of(module, callbacks)}


def E_of(module: Any, callbacks: list[Any]) -> dict[str, Tensor]:
    """The full E of a front end of :func:`parts`, by the names of B; empty for plain LoRA."""
    driver = callbacks[0] if callbacks else getattr(module, "_callback", None)
    return driver.perturbation.state_dict()["E"] if driver else {}


# -- collectives


class Collectives(TorchDispatchMode):
    """Counts calls by name, and bytes of the full tensors in them: their sum and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            name = str(func).split(".")[1].strip("_")
            if "wrap" not in name:
                self.calls[name] += 1
                shares = int(args[1]) if name == "all_gather_into_tensor" else 1  # this one allocates its own output
                size = shares * max(_size(argument) for argument in args)
                self.bytes += size
                self.largest = max(self.largest, size)
        return func(*args, **(kwargs or {}))


def _size(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(argument) if isinstance(t, Tensor))
