"""What is inside of a wrapped model or an optimizer, and under which wrappers of a model no perturbation is exact."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model itself, without what Fabric, torch.compile, DDP and DataParallel have put around it."""
    while True:
        # Not by "or", since a module may have a length, and be false where that is 0.
        inner = model._modules.get("_original_module", model._modules.get("_orig_mod"))
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model._modules["module"]
        if inner is None:
            return model
        model = inner


def innermost(optimizer: Any) -> Any:
    """Give the optimizer of PyTorch in what Fabric, accelerate or a method over another one has made of it."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """List an optimizer's parameters, in the order in which its state numbers them."""
    parameters: list[nn.Parameter] = []
    for param_group in optimizer.param_groups:
        parameters += param_group["params"]
    return parameters


def has_gradient(optimizer: Optimizer) -> bool:
    """Say whether any parameter of an optimizer has a gradient."""
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Inside, no backward of DDP averages gradients over the ranks."""
    with ExitStack() as stack:
        for wrapper in _of_ddp(model):
            stack.enter_context(wrapper.no_sync())
        yield


def wrapping_problems(model: nn.Module, *, takes_two_passes: bool) -> list[str]:
    """Why a perturbation can't be exact in a model as it is wrapped, one line for each reason.

    Args:
        model: as the loop calls it.
        takes_two_passes: whether the method takes a gradient twice, and so the first one without DDP's average.
    """
    modules = list(model.modules())
    problems = []
    if any(is_of("deepspeed", module) for module in modules):
        problems.append(f"DeepSpeed's engine owns the gradients and the optimizer's step: {_USE}")
    megatron = sys.modules.get("megatron.core.parallel_state")
    megatron_runs = megatron is not None and megatron.model_parallel_is_initialized()
    if megatron_runs or any(is_of("megatron", module) for module in modules):
        problems.append(
            "Megatron keeps gradients in buffers of its own, and its tensor parallelism splits the factors: "
            f"{_USE}, without Megatron"
        )
    if FullyShardedDataParallel.fsdp_modules(model):
        problems.append(f"FSDP1 has only been tested under Lightning's Trainer: {_USE}")
    if any(isinstance(module, DataParallel) for module in modules):
        problems.append(f"DataParallel copies the layers to other devices, without their perturbation: {_USE}")
    if takes_two_passes and any(wrapper.static_graph for wrapper in _of_ddp(model)):
        problems.append(
            "DDP's static_graph=True crashes in a backward that does not synchronize (pytorch#143580): leave it out"
        )
    return problems + _mesh_problems(model)


_USE = "use one device, DDP, or FSDP2 (fully_shard)"


def _mesh_problems(model: nn.Module) -> list[str]:
    """What can't work about parameters that the ranks share as DTensors."""
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    problems = []
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded and not (by_fsdp and all(parameter.device_mesh.ndim == 1 for parameter in sharded)):
        problems.append(
            "parameters are split otherwise than by fully_shard over one dimension, as by tensor parallelism or HSDP, "
            f"which is not supported: {_USE}"
        )
    if any(parameter.device.type != parameter.device_mesh.device_type for parameter in sharded):
        problems.append(
            "fully_shard's offload_policy must be left out: parameters would lie on the CPU, while E must be where "
            "the layers run"
        )
    return problems


def _of_ddp(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def is_of(library: str, thing: object) -> bool:
    """Say whether a thing's class, or one that it inherits from, is defined by a library, which is not imported."""
    return any(kind.__module__.split(".")[0] == library for kind in type(thing).__mro__)
