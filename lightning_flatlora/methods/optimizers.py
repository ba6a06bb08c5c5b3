"""Look into an optimizer: its parameters, its steps, and the optimizer inside or around it."""

from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_flatlora.wrappers import is_deepspeeds


def innermost(optimizer: Any) -> Any:
    """Return the innermost PyTorch optimizer, which Fabric, accelerate or another optimizer may have wrapped.

    Of one inside DeepSpeed's, whose groups are flat parts, return DeepSpeed's.
    """
    inner = getattr(optimizer, "optimizer", None)
    while is_deepspeeds(inner) or (isinstance(inner, Optimizer) and not is_deepspeeds(optimizer)):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def stepped(optimizer: Any) -> Any:
    """Return the outermost optimizer whose step calls hooks, such as Lookahead over AdamW; None if there is none."""
    while optimizer is not None:
        # The wrappers of Fabric and accelerate are of such a class too, but don't call the hooks themselves.
        calls_hooks = getattr(getattr(type(optimizer), "step", None), "hooked", False)
        if calls_hooks and "_optimizer_step_pre_hooks" in vars(optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def groups_of(optimizer: Any) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """List an optimizer's groups with their parameters, in the place of which DeepSpeed's groups hold flat parts."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for name in ("bit16_groups", "bf16_groups"):
        if hasattr(optimizer, name):
            return list(zip(groups, getattr(optimizer, name), strict=True))
    if hasattr(optimizer, "sub_group_to_group_id"):  # ZeRO-3
        group_ids = optimizer.sub_group_to_group_id
        return [(groups[group_ids[index]], part) for index, part in enumerate(optimizer.fp16_groups)]
    return [(group, group["params"]) for group in groups]


def parameters_of(*optimizers: Optimizer) -> list[nn.Parameter]:
    """List the parameters of optimizers, each optimizer's in the order of its state."""
    groups = chain.from_iterable(groups_of(optimizer) for optimizer in optimizers)
    return list(chain.from_iterable(parameters for _, parameters in groups))


def only_makes_state(optimizer: Optimizer) -> bool:
    """Say whether the coming step has a rate of 0 and zero gradients, by which PyTorch initializes a state.

    ``torch.distributed.checkpoint`` takes such a step before it loads or returns the state of an optimizer without one.
    """
    if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    # This waits for the device, but few steps get here: a warm-up has a rate of 0 only once.
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    return bool(gradients) and not any(bool((gradient != 0).any()) for gradient in gradients)


def has_gradient(optimizer: Optimizer) -> bool:
    """Say whether any parameter of an optimizer has a gradient."""
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))
