"""Let layers read B + E only inside their own forward, for training loops that don't announce their passes.

The perturbation is on during the call of a layer, in training mode while autograd records. Otherwise, as in
``merge_adapter``, evaluation and generation, the layer reads the clean B.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_flatlora.class_overlay import Overlay, plain_class, set_class
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import GATES_CLOSED, as_ref, autograd_records, in_backward
from lightning_flatlora.rank_zero import rank_zero_warn

GATES = "_flatlora_gates"
"""The attribute of a layer that holds the perturbations which it may read."""

PASSES_UNTIL_WARNING = 1000
"""Backward passes without a step of the optimizer after which a warning says that the loop may step another one."""


class _Gates(list[Perturbation]):
    """The perturbations that a layer may read.

    Attributes:
        trains: whether the layer was in training mode in its last call outside of a backward pass, except evaluations.
    """

    trains = False

    def opened(self, layer: nn.Module) -> list[Perturbation]:
        """Return those that the call that begins reads: those that are to be read in training, if it is of training."""
        # A checkpoint calls the layer again in the backward pass, before which an evaluation may have changed the mode.
        trains = self.trains if in_backward() else layer.training
        # Not in an evaluation, which runs under no_grad.
        if not torch.compiler.is_compiling() and (trains or torch.is_grad_enabled()):
            self.trains = trains
        closed = not trains or GATES_CLOSED.is_on
        found = [] if closed else [each for each in self if each.may_be_nonzero and not each.is_on]
        return found if found and autograd_records() else []


class _Gated(Overlay):
    """Mixin that lets a layer read perturbations in its calls.

    An override of ``forward`` would not be called if a library has put another forward on the layer, and hooks would be
    copied with the model.
    """

    _overlay_state = GATES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if GATES not in self.__dict__:
            # The gates are gone, but this method was kept, as torch.compile(layer) does, or another class above it.
            return plain_class(self).__call__(self, *args, **kwargs)  # type: ignore[arg-type]
        opened = self.__dict__[GATES].opened(self)
        for perturbation in opened:
            perturbation.on()
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            for perturbation in opened:
                perturbation.off()


class ForwardGates:
    """The layers that read one perturbation in their calls."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, Perturbation] = {}

    def install(self, perturbation: Perturbation) -> None:
        """Let the layers of a perturbation's pairs read it in their forward, once its average has begun.

        The perturbation must already be installed.
        """
        self.uninstall()
        for pair in perturbation.pairs:
            layers = list(pair.layers) or [as_ref(reader).module for reader in pair.readers]
            self._layers.update(dict.fromkeys(layers, perturbation))
        for layer in self._layers:
            layer.__dict__.setdefault(GATES, _Gates()).append(perturbation)
            set_class(layer)

    def uninstall(self) -> None:
        """Give the layers their own classes back."""
        for layer, perturbation in self._layers.items():
            layer.__dict__[GATES].remove(perturbation)
            set_class(layer)
        self._layers = {}


class ReceivedGradients:
    """Records which B got a gradient from this rank's backward: neither zeros nor gradients that DDP brings.

    Attributes:
        identities: those of these B, until :meth:`forget`.
    """

    def __init__(self) -> None:
        self.identities: set[int] = set()
        self._count = 0
        self._hooks = ExitStack()

    def watch(self, pairs: Iterable[LoRAPair]) -> None:
        """Note from now on which trained B of these pairs receive a gradient."""
        for pair in pairs:
            if pair.B.requires_grad:
                B: Any = pair.B
                self._hooks.callback(B.register_post_accumulate_grad_hook(self._note).remove)

    def _note(self, B: nn.Parameter) -> None:
        self.identities.add(id(B))
        self._count += 1
        if self._count == PASSES_UNTIL_WARNING * len(self.identities):
            rank_zero_warn(
                f"{PASSES_UNTIL_WARNING} backward passes without a step of the optimizer that EFMLoRA or FMLoRA was "
                "made with: unless the loop accumulates over that many, make it with the optimizer that the loop "
                "steps, or call close() to train without it"
            )

    def forget(self) -> None:
        """Forget the notes, since the gradients are used."""
        self.identities.clear()
        self._count = 0

    def unwatch(self) -> None:
        """Remove the hooks, and forget the notes."""
        self._hooks.close()
        self.forget()
