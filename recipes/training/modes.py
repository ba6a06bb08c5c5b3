"""Evaluation in the middle of training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode inside; afterwards each of its parts has the mode that it had."""
    with ExitStack() as stack:
        # Of each part, since frozen batch norms are in evaluation mode while the rest trains.
        for part in net.modules():
            stack.callback(setattr, part, "training", part.training)
        net.eval()
        yield
