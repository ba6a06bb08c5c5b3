"""The loss of fixed batches as a function of the weights: its value, and its gradient for LoRA's factors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import helpers
from torch import Tensor, nn

from lightning_flatlora.functional import wide
from lightning_flatlora.perturbed_read import gates_closed
from lightning_flatlora.sharding import average

Loss = Callable[[], Tensor]
"""The mean loss of fixed batches at the weights that the layers read now: a differentiable scalar, without dropout
or other noise. If a process group runs, each rank gives its own batches' loss."""


class MeanLoss:
    """The mean of several batches' losses, whose gradients are taken one batch at a time to save memory.

    Args:
        losses: one per batch; at least one.

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
        """Compute the mean, with the graphs of all batches."""
        return torch.stack([loss() for loss in self.losses]).mean()


class LossGradient(NamedTuple):
    """A loss and its gradient at one point.

    Attributes:
        loss: in nats, float32 or wider, shape ().
        parameters: with respect to which the gradient was taken.
        gradients: of the parameters' shapes and dtypes.
    """

    loss: Tensor
    parameters: list[nn.Parameter]
    gradients: list[Tensor]

    def of(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient with respect to one of the parameters."""
        return dict(zip(self.parameters, self.gradients, strict=True))[parameter]

    @contextmanager
    def as_grad(self) -> Iterator[None]:
        """Set ``.grad`` of the parameters to this gradient inside; afterwards restore the former tensors."""
        with ExitStack() as stack:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = gradient
            yield


def value(loss: Loss) -> Tensor:
    """Compute the loss in one forward pass: shape (), float32 or wider, without a graph."""
    with torch.no_grad(), differentiable():
        mean = torch.stack([wide(computed(part)) for part in losses_of(loss)]).mean()
    average([mean])
    return mean


def loss_gradient(loss: Loss, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> LossGradient:
    """Compute the loss and its gradient in a forward and a backward pass, without touching ``.grad`` or its hooks.

    Args:
        loss: mean loss of fixed batches.
        parameters: trainable ones; the gradient is zero for those that the loss does not use.
        scale: multiplies the loss in the backward pass and divides the gradient, like a loss scaler under float16.

    Returns:
        The gradient is nan if the loss is not finite.

    Raises:
        ValueError: the loss is not a scalar with a graph, or layers are under reentrant checkpoints.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0]))
        >>> loss_gradient(lambda: w.square().sum(), [w]).gradients
        [tensor([6.])]
    """
    parameters = list(parameters)

    # torch.autograd.grad and not backward(), so as not to touch .grad and the hooks of parameters.
    def scaled_gradient(loss: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)

    mean, gradients = mean_derivative(loss, parameters, scaled_gradient, scale)
    return LossGradient(mean, parameters, gradients)


def mean_derivative(
    loss: Loss, parameters: Sequence[nn.Parameter], derivative: Callable[[Tensor], Sequence[Tensor]], scale: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Average a loss and a derivative over all batches and ranks; the latter is nan if the loss is not finite.

    Args:
        loss: mean loss of fixed batches.
        parameters: have the shapes of the derivative.
        derivative: maps a batch's loss to its derivative.
        scale: contained in the derivative, which is divided by it.
    """
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    losses = losses_of(loss)
    # Also around the backward passes, in which a checkpoint runs forward again.
    with torch.enable_grad(), differentiable():
        values = [_add_derivative(part, derivative, sums) for part in losses]
    mean = torch.stack(values).mean()
    # The scale is removed only after the sum, so that small gradients do not underflow in 16 bits.
    torch._foreach_div_(sums, len(losses) * scale)
    average([mean, *sums])
    return mean, sums


def _add_derivative(part: Loss, derivative: Callable[[Tensor], Sequence[Tensor]], sums: list[Tensor]) -> Tensor:
    """Add one batch's derivative and return its loss; its graph is freed on return."""
    loss = computed(part)
    if not loss.requires_grad:
        raise ValueError("the loss has no graph: it must depend on parameters that require a gradient")
    refuse_reentrant(loss)
    # The mean over no labels is nan, with a gradient of 0.
    nan_or_0 = torch.where(loss.detach().isfinite(), 0.0, torch.nan)
    for total, new in zip(sums, derivative(loss), strict=True):
        total += new + nan_or_0.to(new.device, new.dtype)
    return wide(loss.detach())


def computed(part: Loss) -> Tensor:
    """Compute one batch's loss from the weights as they are.

    Raises:
        ValueError: it is not a Tensor with one number.
    """
    loss: object = part()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a Tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss must return a Tensor with one number, got {given}")
    return loss


def refuse_reentrant(loss: Tensor) -> None:
    """Refuse a loss in whose graph a reentrant checkpoint hides layers: their gradients would be 0.

    Raises:
        ValueError: there is one.
    """
    nodes: list[Any] = [loss.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError("a reentrant activation checkpoint hides gradients of layers: set use_reentrant=False")
        nodes += [before for before, _ in node.next_functions]


@contextmanager
def differentiable() -> Iterator[None]:
    """Let a loss inside use the current weights, with its whole graph: nothing is cached."""
    # The cache of DoRA's norms and products, since peft 0.19.
    caching = getattr(helpers, "DoraCaching", None)
    # A loop's gates would otherwise let layers in training mode read B + Ê.
    with gates_closed(), caching(enabled=False) if caching else nullcontext():
        yield


def losses_of(loss: Loss) -> Sequence[Loss]:
    """Return a loss's single batches' losses, if it has them, or the loss itself."""
    return loss.losses if isinstance(loss, MeanLoss) else [loss]
