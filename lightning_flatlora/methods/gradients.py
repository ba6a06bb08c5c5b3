"""Gradients that a pass sets aside and puts back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """An optimizer's parameters, in the order in which its state numbers them."""
    parameters: list[nn.Parameter] = []
    for param_group in optimizer.param_groups:
        parameters += param_group["params"]
    return parameters


def has_gradient(optimizer: Optimizer) -> bool:
    """Whether any parameter of an optimizer has a gradient."""
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Inside, gradients begin anew, so that the ascent's stand alone; afterwards those from before are back.

    Args:
        parameters: the module's, as the fit started: FSDP shows stand-ins for them between forward and backward.
        optimizers: the trainer's. They also hold what the module's own list lacks: parameters in a plain list or a loss
            object, and those that have joined in the middle of the fit.
    """
    taken = {}
    for parameter in _holders(parameters, optimizers):
        if parameter.grad is not None:
            taken[parameter] = parameter.grad.clone()
            # In place, not by a new tensor: DDP's gradient_as_bucket_view and FSDP1 own the memory of p.grad.
            parameter.grad.zero_()
    try:
        yield
    finally:
        # Listed again, because hooks of the backward may have given the optimizer new parameters.
        for parameter in _holders(parameters, optimizers):
            if parameter.grad is not None and parameter in taken:
                parameter.grad.copy_(taken[parameter])  # in place, as above
            else:
                # None and not zeros: AdamW leaves a parameter without a gradient alone, and would decay one with zeros.
                parameter.grad = None


def _holders(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """The parameters whose gradients a pass may change and a step may read, each once, as they are at this moment."""
    holders = dict.fromkeys(parameters)
    for optimizer in optimizers:
        holders.update(dict.fromkeys(parameters_of(optimizer)))
    return list(holders)
