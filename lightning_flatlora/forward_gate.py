"""Let layers read B + E inside their own forward only, for training loops in which no pass is announced.

A layer is given a subclass of its own class whose ``__call__`` switches the perturbation on around the forward, in
training mode while autograd records. Outside of it, as in ``merge_adapter``, and in evaluation and generation, the
layer reads the clean B. (An override of ``forward`` would not be called if a library has put another forward on the
layer itself, and hooks would go into copies of the model.)
"""

import copyreg
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.read_through import as_reader


class ForwardGate:
    """The layers of one perturbation.

    Attributes:
        has_opened: whether any layer has read B + E since this was last set to False.
    """

    def __init__(self) -> None:
        self.has_opened = False
        self._perturbation: Perturbation | None = None
        self._layers: list[nn.Module] = []

    def install(self, perturbation: Perturbation) -> None:
        """Let the layers of a perturbation's pairs read it in their forward, once its average has begun.

        The perturbation must be installed before and uninstalled after the gate.
        """
        self.uninstall()
        self._perturbation = perturbation
        self._layers = list(layers_of(perturbation.pairs))
        for layer in self._layers:
            gates: list[ForwardGate] | None = layer.__dict__.get("_gates")
            if gates is None:
                plain: Any = type(layer)
                layer.__dict__["_gates"] = gates = []
                # A subclass and not a method on the class, since other modules of the class must stay as they are.
                layer.__class__ = _gated_class(plain)
            gates.append(self)

    def uninstall(self) -> None:
        """Give the layers their own classes back."""
        for layer in self._layers:
            gates: list[ForwardGate] = layer.__dict__["_gates"]
            gates.remove(self)
            if not gates:
                layer.__class__ = layer._plain_class  # type: ignore[assignment]
                del layer.__dict__["_gates"]
        self._layers = []
        self._perturbation = None

    def opens(self, layer: nn.Module) -> bool:
        """Say whether a forward of a layer that begins now is one of training, and there is something to read."""
        perturbation = self._perturbation
        if perturbation is None or not layer.training or not perturbation.may_be_nonzero or perturbation.is_on:
            return False
        return torch.is_grad_enabled() or _in_reentrant_checkpoint()

    def switch(self, is_on: bool) -> None:
        """Switch the perturbation for the forward of a layer."""
        assert self._perturbation is not None
        if is_on:
            self.has_opened = True
            self._perturbation.on()
        else:
            self._perturbation.off()


class _Gated:
    """Mixin before a layer's own class."""

    _gates: list[ForwardGate]
    _plain_class: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        opened = [gate for gate in self._gates if gate.opens(layer)]
        if not opened:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        for gate in opened:
            gate.switch(True)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            for gate in opened:
                gate.switch(False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Make copies and pickles of the plain class."""
        hidden = ("_gates", "_readings")
        state = {key: value for key, value in self.__dict__.items() if key not in hidden}
        # A layer that holds B itself has a reading class too.
        plain = getattr(self._plain_class, "_plain_class", self._plain_class)
        return copyreg._reconstructor, (plain, object, None), state  # type: ignore[attr-defined]


# One class for each kind of layer: compiled graphs are guarded by the class.
@cache
def _gated_class(plain: Any) -> Any:
    return type(f"Gated{plain.__name__}", (_Gated, plain), {"_plain_class": plain})


def layers_of(pairs: Iterable[LoRAPair]) -> dict[nn.Module, None]:
    """The modules in whose forward the B of pairs is read, each once."""
    layers: dict[nn.Module, None] = {}
    for pair in pairs:
        of_pair = pair.layers or [as_reader(reader).module for reader in pair.readers]
        layers.update(dict.fromkeys(of_pair))
    return layers


def _in_reentrant_checkpoint() -> bool:
    """Whether this is the first forward of reentrant activation checkpointing, which records nothing.

    It computes the loss, and its backward computes the same forward again with autograd: both must read B + E.
    Nothing public says so, so the calls that have led here are looked at.
    """
    if torch.compiler.is_compiling():
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
