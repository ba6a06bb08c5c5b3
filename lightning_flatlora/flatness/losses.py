"""The loss of fixed batches as a function of the weights: its value, and its gradient for LoRA's factors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from peft.helpers import DoraCaching
from torch import Tensor, nn

from lightning_flatlora.distributed import average

Loss = Callable[[], Tensor]
"""The mean loss of fixed batches at the weights as the layers read them now: a differentiable scalar, without dropout
or other noise. Where a process group runs, each rank gives its own batches' loss, every rank has to take part, and all
values and gradients are means over the ranks."""


class ReentrantCheckpointError(ValueError):
    """A loss has reentrant activation checkpoints, in which torch.autograd.grad finds no parameters."""


class MeanLoss:
    """The mean of the losses of several batches, whose gradients are taken one batch at a time: memory of one batch.

    Args:
        losses: one for each batch; at least one.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> MeanLoss([lambda: w.sum(), lambda: 3 * w.sum()])().item()
        4.0
    """

    def __init__(self, losses: Sequence[Loss]) -> None:
        if not losses:
            raise ValueError("losses must hold at least one batch's loss")
        self.losses = losses

    def __call__(self) -> Tensor:
        """The mean, with the graphs of all batches."""
        return torch.stack([loss() for loss in self.losses]).mean()


class LossGradient(NamedTuple):
    """A loss and its gradient at one point.

    Attributes:
        loss: in nats, float32 or wider, shape ().
        parameters: by which the gradient was taken.
        gradients: of the parameters' shapes and dtypes.
    """

    loss: Tensor
    parameters: list[nn.Parameter]
    gradients: list[Tensor]

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The gradient with respect to one of the parameters."""
        for own, gradient in zip(self.parameters, self.gradients, strict=True):
            if own is parameter:
                return gradient
        raise KeyError("the gradient was not taken with respect to this parameter")

    @contextmanager
    def as_grad(self) -> Iterator[None]:
        """Inside, ``.grad`` of the parameters is this gradient; afterwards, the same tensors as before."""
        with ExitStack() as stack:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = gradient
            yield


def value(loss: Loss) -> Tensor:
    """The loss at the weights as the layers read them now, in one forward pass.

    Args:
        loss: of fixed batches.

    Returns:
        Shape (), float32 or wider, without a graph.
    """
    with torch.no_grad():
        mean = torch.stack([_wide(computed(part)) for part in losses_of(loss)]).mean()
    average([mean])
    return mean


def loss_gradient(loss: Loss, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> LossGradient:
    """The loss and its gradient, in a forward and a backward pass; ``.grad`` and its hooks are not touched.

    Args:
        loss: of fixed batches.
        parameters: trained ones; those that the loss does not use have a gradient of zero.
        scale: multiplies the loss in the backward pass and divides the gradient, like a loss scaler under float16.

    Returns:
        The :class:`LossGradient` at the weights as the layers read them now; its gradient is nan where the loss is not
        finite.

    Raises:
        ValueError: the loss gives no scalar with a graph, or has reentrant activation checkpoints.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0]))
        >>> loss_gradient(lambda: w.square().sum(), [w]).gradients
        [tensor([6.])]
    """
    parameters = list(parameters)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    losses = losses_of(loss)
    values = []
    with torch.enable_grad():
        for part in losses:
            values.append(_add_gradient(part, parameters, gradients, scale))
    mean = torch.stack(values).mean()
    # The scale is taken out only now, after the sum, so that small gradients do not underflow in 16 bits.
    torch._foreach_div_(gradients, len(losses) * scale)
    average([mean, *gradients])
    return LossGradient(mean, parameters, gradients)


def _add_gradient(part: Loss, parameters: list[nn.Parameter], gradients: list[Tensor], scale: float) -> Tensor:
    """One batch's loss, whose scaled gradient is added; its graph ends with the call."""
    # torch.autograd.grad and not backward(), so that .grad and the hooks of parameters are left alone.
    loss = checked(computed(part))
    new = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    add_if_finite(gradients, new, loss)
    return _wide(loss.detach())


def computed(part: Loss) -> Tensor:
    """One batch's loss from the weights as they are: of DoRA's layers peft may cache what they have computed before."""
    with DoraCaching(enabled=False):
        return part()


def checked(loss: object) -> Tensor:
    """A batch's loss, if its gradient can be taken.

    Raises:
        ValueError: it is no Tensor with one number and a graph.
        ReentrantCheckpointError: a part of its graph is built in the backward pass alone.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a Tensor of the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss must give a Tensor with one number, and has given {given}")
    if loss.grad_fn is None and not loss.requires_grad:
        raise ValueError("the loss has no graph: it must depend on parameters that require a gradient")
    if _has_reentrant_checkpoint(loss):
        raise ReentrantCheckpointError(
            "the loss has reentrant activation checkpoints, whose parameters would seem to have no gradient: give "
            "use_reentrant=False to torch.utils.checkpoint (to transformers gradient_checkpointing_kwargs="
            "{'use_reentrant': False})"
        )
    return loss


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph has a node of reentrant checkpointing, which torch.autograd.grad leaves out."""
    seen = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def add_if_finite(sums: list[Tensor], new: Sequence[Tensor], loss: Tensor) -> None:
    """Add one batch's derivatives; nan where its loss is not finite, since a mean over no label has a gradient of 0."""
    nan_or_0 = torch.where(loss.detach().isfinite(), 0.0, torch.nan)
    for total, each in zip(sums, new, strict=True):
        total += each + nan_or_0.to(each.device, each.dtype)


def losses_of(loss: Loss) -> Sequence[Loss]:
    """The losses of single batches, where a loss has them."""
    return loss.losses if isinstance(loss, MeanLoss) else [loss]


def _wide(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32))
