"""A recipe's model sharded by its own transformer blocks: under FSDP2, and under FSDP1."""

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel
from typing_extensions import override

_METHODS = ("generate", "encode_image", "encode_text")


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all devices of any number of nodes, with one file per checkpoint.

    ModelParallelStrategy's own defaults would split each layer over the devices of a node (tensor parallelism) instead.

    Args:
        process_group_backend: "nccl" or "gloo"; None takes the device's default.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    @override
    def setup_environment(self) -> None:
        # Known only now. Lightning's own "auto" would be the number of nodes, which leaves out the devices of each.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class BlocksAndFactors:
    """FSDP1's ``auto_wrap_policy``: each transformer block is a unit, and each trained layer inside it another.

    FSDP1 flattens a unit into one tensor: it must be of one dtype, and if a part of it is trained, the frozen part
    gets a gradient too. With separate units for the adapter's factors the frozen base keeps its dtype and no gradient.
    """

    def __init__(self) -> None:
        self._blocks: set[int] = set()

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Tell FSDP, on its way down from the root, whether to descend into a module and whether to wrap it."""
        # Only the model around a block names it as one, and FSDP asks about that model first: hence the set.
        self._blocks |= {id(block) for block in blocks(module)}
        is_trained_layer = any(p.requires_grad for p in module.parameters(recurse=False))
        return recurse or id(module) in self._blocks or is_trained_layer


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks inside: modules that transformers does not split, open_clip's and timm's blocks."""
    names: set[str] = set()
    stacked: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            names.update(module._no_split_modules or ())
        for name in ("resblocks", "blocks"):
            stack = getattr(module, name, None)
            if isinstance(stack, nn.ModuleList | nn.Sequential):
                stacked.update(map(id, stack))
    return [module for module in model.modules() if type(module).__name__ in names or id(module) in stacked]


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Apply FSDP2 in place, unless that has been done: each block a unit, and the rest another.

    Args:
        net: a peft model around one of transformers or open_clip.
        mesh: the ranks that share the parameters.
    """
    if isinstance(net, FSDPModule):
        return
    for block in reversed(blocks(net)):  # FSDP2 wants inner modules first
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in _METHODS:  # they bypass `net`'s forward, which gathers parameters outside blocks, such as embeddings
        if hasattr(net, method):
            register_fsdp_forward_method(net, method)


def is_sharded(net: nn.Module) -> bool:
    """Return whether a forward of some part of the model needs all ranks."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in net.modules())


def check_strategy(strategy: Strategy, quantization: str | None = None, lora: dict[str, Any] | None = None) -> None:
    """Refuse, before the model is loaded, settings that can't be sharded.

    Raises:
        MisconfigurationException: with the remedy.
    """
    if not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        return
    problem = None
    wraps = strategy.kwargs.get("auto_wrap_policy") if isinstance(strategy, FSDPStrategy) else None
    if not (wraps or isinstance(strategy, FSDP2)):
        problem = (
            "sharding needs an auto_wrap_policy that keeps the adapter apart from the frozen weights, or FSDP2 without "
            "tensor parallelism: add --config recipes/configs/strategies/fsdp1.yaml or fsdp2.yaml"
        )
    elif quantization is not None:
        problem = f"quantization={quantization!r} is not tested with sharded weights: use ddp, or set it to null"
    elif wraps and (lora or {}).get("use_dora"):
        problem = "DoRA reads weights of several FSDP1 units at once: use FSDP2 or ddp, or set use_dora to false"
    if problem:
        raise MisconfigurationException(problem)
