"""Evaluation in the middle of training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode inside; afterwards each part gets back its own mode."""
    with ExitStack() as stack:
        # For each part, since frozen batch norms are in evaluation mode while the rest trains.
        for part in net.modules():
            stack.callback(setattr, part, "training", part.training)
        net.eval()
        yield
