"""Look into an optimizer: its parameters, its steps, and the optimizer inside or around it."""

from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer


def innermost(optimizer: Any) -> Any:
    """Return the innermost PyTorch optimizer, which Fabric, accelerate or another optimizer may have wrapped."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
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


def parameters_of(*optimizers: Optimizer) -> list[nn.Parameter]:
    """List the parameters of optimizers, each optimizer's in the order of its state."""
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return list(chain.from_iterable(group["params"] for group in groups))


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
