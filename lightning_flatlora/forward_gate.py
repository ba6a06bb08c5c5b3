"""Let layers read B + E inside their own forward only, for training loops in which no pass is announced.

The perturbation is switched on around the call of a layer, in training mode while autograd records. Outside of it, as
in ``merge_adapter``, and in evaluation and generation, the layer reads the clean B.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from lightning_flatlora.class_overlay import GATES, set_class
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import AnyRef, Reads, as_ref, reads_of


class ForwardGate:
    """The layers of one perturbation, and how they were read since the last step.

    Attributes:
        perturbation: which a layer switches on around its call if the gate opens.
    """

    _is_closed: ClassVar[bool] = False

    def __init__(self) -> None:
        self._layers: dict[nn.Module, None] = {}
        self._reads: dict[AnyRef, Reads] = {}

    def install(self, perturbation: Perturbation) -> None:
        """Let the layers of a perturbation's pairs read it in their forward, once its average has begun.

        The perturbation must be installed before.
        """
        self.uninstall()
        self.perturbation = perturbation
        for pair in perturbation.pairs:
            self._layers.update(dict.fromkeys(_layers_of(pair)))
            self._reads.update({reader: reads_of(reader) for reader in pair.readers})
        for layer in self._layers:
            layer.__dict__.setdefault(GATES, []).append(self)
            set_class(layer)

    def uninstall(self) -> None:
        """Give the layers their own classes back."""
        for layer in self._layers:
            layer.__dict__[GATES].remove(self)
            set_class(layer)
        self._layers, self._reads = {}, {}

    @staticmethod
    @contextmanager
    def closed() -> Iterator[None]:
        """Inside, no gate opens in a forward that begins, as for a measurement at the clean weights."""
        before, ForwardGate._is_closed = ForwardGate._is_closed, True
        try:
            yield
        finally:
            ForwardGate._is_closed = before

    @property
    def has_been_read(self) -> bool:
        """Whether any B was read, clean or perturbed, since :meth:`forget_reads`."""
        return any(reads.clean or reads.perturbed for reads in self._reads.values())

    def forget_reads(self) -> None:
        """Start again to note how each B is read."""
        for reads in self._reads.values():
            reads.clean = reads.perturbed = False

    def missed(self) -> list[LoRAPair]:
        """List the pairs with a gradient that a layer has only read clean."""
        clean = {reader for reader, reads in self._reads.items() if reads.clean and not reads.perturbed}
        with_gradient = [pair for pair in self.perturbation.pairs if pair.B.grad is not None]
        return [pair for pair in with_gradient if not clean.isdisjoint(pair.readers)]

    def opens(self, layer: nn.Module) -> bool:
        """Say whether a forward of a layer that begins now is one of training, and there is something to read."""
        if self._is_closed or not layer.training or not self.perturbation.may_be_nonzero or self.perturbation.is_on:
            return False
        return torch.is_grad_enabled() or _in_reentrant_checkpoint()


def _layers_of(pair: LoRAPair) -> list[nn.Module]:
    return list(pair.layers) or [as_ref(reader).module for reader in pair.readers]


def _in_reentrant_checkpoint() -> bool:
    """Say whether this is the first forward of reentrant activation checkpointing, which records nothing.

    It computes the loss, and its backward computes the same forward again with autograd: both must read B + E. PyTorch
    and other libraries do so inside of an autograd Function. Nothing public says so, so the calls that have led here
    are looked at.
    """
    if torch.compiler.is_compiling():
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        # By this name first, since f_locals would keep all tensors of a frame alive.
        if frame.f_code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            if isinstance(ctx, FunctionCtx):
                # In generation there is such a Function too, but nothing to go back to.
                return bool(getattr(ctx, "next_functions", ()))
        frame = frame.f_back
    return False
