"""Wrappers around a model and its layers: look inside them, and name those that rule out an exact perturbation."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from lightning_flatlora.sharding import world_size

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPER_NAMES = re.compile(rf"(^|\.)({'|'.join(_WRAPPED)})(?=\.)")


OPACUS = (
    "Opacus clips each example's gradient and adds its noise inside the optimizer's step, but the perturbation would "
    "come from the gradients before that, which the privacy budget does not cover: train plain LoRA under Opacus"
)

ONE_PASS_ONLY = "DeepSpeed adds each pass to the gradients of the step, so two are impossible: use EFMLoRA"


def clean_name(name: str) -> str:
    """Return a parameter's name without the parts that FSDP, torch.compile and activation checkpointing insert.

    Example:
        >>> clean_name("model._orig_mod.layer._checkpoint_wrapped_module.lora_B.default.weight")
        'model.layer.lora_B.default.weight'
    """
    return _WRAPPER_NAMES.sub("", name).removeprefix(".")


def bare(module: Any) -> Any:
    """Return a module without the wrappers of a wrapping policy, compilation, checkpointing or Fabric."""
    while True:
        children = getattr(module, "_modules", {})
        inner = next((children[name] for name in (*_WRAPPED, "_original_module") if name in children), None)
        if inner is None:
            return module
        module = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, without the wrappers of Fabric, torch.compile, DDP, DataParallel and DeepSpeed."""
    model = bare(model)
    while isinstance(model, (DistributedDataParallel, DataParallel)) or is_engine(model):
        model = bare(model._modules["module"])
    return model


def is_engine(module: object) -> bool:
    """Say whether a module is DeepSpeed's engine around a model."""
    return is_of("deepspeed", module) and hasattr(module, "save_checkpoint")


def is_deepspeeds(optimizer: object) -> bool:
    """Say whether an optimizer is one of DeepSpeed's around PyTorch's, which holds parts of the parameters."""
    return is_of("deepspeed", optimizer) and not isinstance(optimizer, Optimizer)


def engine_of(model: nn.Module) -> Any:
    """Return DeepSpeed's engine in or around a model; None if there is none."""
    return next(filter(is_engine, model.modules()), None)


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Keep DDP's backwards inside from averaging gradients over the ranks."""
    with ExitStack() as stack:
        for wrapper in _of_ddp(model):
            stack.enter_context(wrapper.no_sync())
        yield


def wrapping_problems(
    model: nn.Module, unsynchronized: Sequence[str], *, takes_fsdp1: bool = False, takes_deepspeed: bool = False
) -> list[str]:
    """List why a perturbation can't be exact in a model as it is wrapped, one line for each reason.

    Args:
        model: the module that the loop or Lightning's strategy calls.
        unsynchronized: settings with which some backward passes skip DDP's averaging, as the user wrote them.
        takes_fsdp1: whether FSDP1 works, as under Lightning's Trainer.
        takes_deepspeed: whether DeepSpeed's engine works.
    """
    modules = list(model.modules())
    megatron = sys.modules.get("megatron.core.parallel_state")
    megatron_runs = megatron is not None and megatron.model_parallel_is_initialized()
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    by_fsdp = any(isinstance(module, FSDPModule) for module in modules)
    unsupported = []
    of_deepspeed = [type(module).__name__ for module in modules if is_of("deepspeed", module)]
    allowed = "DeepSpeedEngine" if takes_deepspeed else None
    unsupported += [f"DeepSpeed's {name}" for name in dict.fromkeys(of_deepspeed) if name != allowed]
    if any(map(_has_plain_parts, modules)):
        unsupported.append("tensor parallelism of transformers before 5.17")
    if megatron_runs or any(is_of("megatron", module) for module in modules):
        unsupported.append("Megatron")
    if not takes_fsdp1 and FullyShardedDataParallel.fsdp_modules(model):
        unsupported.append("FSDP1")
    if any(isinstance(module, DataParallel) for module in modules):
        unsupported.append("DataParallel")
    meshes = {parameter.device_mesh for parameter in sharded}
    if any(mesh.ndim > 1 for mesh in meshes):
        unsupported.append("a model split over two dimensions (HSDP, FSDP2 with tensor parallelism)")
    elif not by_fsdp and any(mesh.size() < world_size() for mesh in meshes):
        unsupported.append("tensor parallelism over some of the ranks")
    if any(parameter.device.type != parameter.device_mesh.device_type for parameter in sharded):
        unsupported.append("fully_shard's offload_policy")
    problems = [f"{what} is not supported: use one device, DDP, or FSDP2 (fully_shard)" for what in unsupported]
    if unsynchronized and any(wrapper.static_graph for wrapper in _of_ddp(model)):
        problems.append(
            "DDP's static_graph=True crashes in a backward that does not synchronize (pytorch#143580), as with "
            f"{' and '.join(unsynchronized)}: leave static_graph out"
        )
    return problems


def _has_plain_parts(module: nn.Module) -> bool:
    """Say whether transformers 5.4 to 5.16 has left plain parts of a layer, of which a norm would be a part's."""
    if hasattr(module, "_tp_info"):
        return True
    weights = module.parameters(recurse=False)
    return bool(getattr(module, "_hf_tp_plan", None)) and not any(isinstance(each, DTensor) for each in weights)


def _of_ddp(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def is_of(library: str, thing: object) -> bool:
    """Say whether an object's class, or a base class, comes from a library, without importing the library."""
    return any(kind.__module__.split(".")[0] == library for kind in type(thing).__mro__)
