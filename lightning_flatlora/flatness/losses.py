"""The loss of fixed batches as a function of the weights: its value, and its gradient for LoRA's factors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.distributed import average

Loss = Callable[[], Tensor]
"""The mean loss of fixed batches at the weights as the layers read them now: a differentiable scalar, without dropout
or other noise. Where a process group runs, each rank gives its own batches' loss, every rank has to take part, and all
values and gradients are means over the ranks."""


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
        mean = torch.stack([_wide(part()) for part in losses_of(loss)]).mean()
    average([mean])
    return mean


def loss_gradient(loss: Loss, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> LossGradient:
    """The loss and its gradient, in a forward and a backward pass; ``.grad`` and its hooks are not touched.

    Args:
        loss: of fixed batches.
        parameters: trained ones; those that the loss does not use have a gradient of zero.
        scale: multiplies the loss in the backward pass and divides the gradient, like a loss scaler under float16.

    Returns:
        The :class:`LossGradient` at the weights as the layers read them now.

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
    loss = part()
    new = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    torch._foreach_add_(gradients, list(new))
    return _wide(loss.detach())


def losses_of(loss: Loss) -> Sequence[Loss]:
    """The losses of single batches, where a loss has them."""
    return loss.losses if isinstance(loss, MeanLoss) else [loss]


def _wide(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32))
