"""What is inside of a wrapped model or an optimizer, and under which wrappers of a model no perturbation is exact."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from lightning_flatlora.pairs.peft_pairs import bare


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the model itself, without what Fabric, torch.compile, DDP and DataParallel have put around it."""
    model = bare(model)
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = bare(model._modules["module"])
    return model


def innermost(optimizer: Any) -> Any:
    """Give the optimizer of PyTorch in what Fabric, accelerate or a method over another one has made of it."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def stepped(optimizer: Any) -> Any:
    """Give the outermost optimizer whose step calls hooks, such as Lookahead over AdamW; None if there is none."""
    while optimizer is not None:
        # Those that Fabric and accelerate make are of such a class too, but don't call the hooks themselves.
        calls_hooks = getattr(getattr(type(optimizer), "step", None), "hooked", False)
        if calls_hooks and "_optimizer_step_pre_hooks" in vars(optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def parameters_of(*optimizers: Optimizer) -> list[nn.Parameter]:
    """List the parameters of optimizers, of each in the order in which its state numbers them."""
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return list(chain.from_iterable(group["params"] for group in groups))


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a step another closure, by position if it has been given so."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def has_stepped(optimizer: Optimizer) -> bool:
    """Say whether an optimizer has the state of steps, its own or loaded ones."""
    # Adagrad has a state from the start, and counts steps in it.
    return any(bool(state.get("step", 1) != 0) for state in optimizer.state.values())


def only_makes_state(optimizer: Optimizer) -> bool:
    """Say whether the coming step is the one with a rate of 0 and zero gradients by which PyTorch makes a state.

    ``torch.distributed.checkpoint`` takes it before it loads, or shows, the state of an optimizer that has none.
    """
    if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    # This waits for the device, but few steps come so far: a warm-up has its rate of 0 once.
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    return bool(gradients) and not any(bool((gradient != 0).any()) for gradient in gradients)


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


def wrapping_problems(model: nn.Module, unsynchronized: Sequence[str], *, takes_fsdp1: bool = False) -> list[str]:
    """Why a perturbation can't be exact in a model as it is wrapped, one line for each reason.

    Args:
        model: as the loop or Lightning's strategy calls it.
        unsynchronized: settings with which some backward passes leave DDP's average out, as the user wrote them.
        takes_fsdp1: whether FSDP1 works, as it does under Lightning's Trainer.
    """
    modules = list(model.modules())
    megatron = sys.modules.get("megatron.core.parallel_state")
    megatron_runs = megatron is not None and megatron.model_parallel_is_initialized()
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    by_fsdp = any(isinstance(module, FSDPModule) for module in modules)
    problems = []
    if any(is_of("deepspeed", module) for module in modules):
        problems.append(f"DeepSpeed is not supported yet: {_USE}")
    if megatron_runs or any(is_of("megatron", module) for module in modules):
        problems.append(f"Megatron keeps gradients in its own buffers; tensor parallelism splits the factors: {_USE}")
    if not takes_fsdp1 and FullyShardedDataParallel.fsdp_modules(model):
        problems.append(f"FSDP1 has only been tested under Lightning's Trainer: {_USE}")
    if any(isinstance(module, DataParallel) for module in modules):
        problems.append(f"DataParallel copies the layers to other devices, without their perturbation: {_USE}")
    if unsynchronized and any(wrapper.static_graph for wrapper in _of_ddp(model)):
        problems.append(
            "DDP's static_graph=True crashes in a backward that does not synchronize (pytorch#143580), as with "
            f"{' and '.join(unsynchronized)}: leave static_graph out"
        )
    if sharded and not (by_fsdp and all(parameter.device_mesh.ndim == 1 for parameter in sharded)):
        problems.append(
            f"parameters must be split by fully_shard over one dimension, not as by tensor parallelism or HSDP: {_USE}"
        )
    if any(parameter.device.type != parameter.device_mesh.device_type for parameter in sharded):
        problems.append("fully_shard's offload_policy must be left out: E and parameters must be where the layers run")
    return problems


_USE = "use one device, DDP, or FSDP2 (fully_shard)"


def _of_ddp(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def is_of(library: str, thing: object) -> bool:
    """Say whether a thing's class, or one that it inherits from, is defined by a library, which is not imported."""
    return any(kind.__module__.split(".")[0] == library for kind in type(thing).__mro__)
