"""Let layers read B + E only inside their own forward, for training loops that don't announce their passes.

The perturbation is on during the call of a layer, in training mode while autograd records. Otherwise, as in
``merge_adapter``, evaluation and generation, the layer reads the clean B.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_flatlora.class_overlay import Overlay, set_class
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.perturbed_read import GATES_CLOSED, as_ref, autograd_records

GATES = "_flatlora_gates"
"""The attribute of a layer that holds its gates."""

PASSES_UNTIL_WARNING = 100
"""Backward passes without a step of the optimizer after which a warning says that the loop may step another one."""


class ForwardGate:
    """Lets one layer read a perturbation in its forward.

    Attributes:
        perturbation: is on during the layer's call if the gate opens.
        has_opened: whether the gate has opened since this was last set to False.
    """

    def __init__(self, perturbation: Perturbation) -> None:
        self.perturbation = perturbation
        self.has_opened = False

    def opens_for(self, layer: nn.Module) -> bool:
        """Say whether the forward that begins is one of training, with a perturbation to read; if so, note it."""
        if GATES_CLOSED.is_on or not layer.training:
            return False
        if not self.perturbation.may_be_nonzero or self.perturbation.is_on or not autograd_records():
            return False
        self.has_opened = True
        return True


class _Gated(Overlay):
    """Mixin that asks gates around each call of a layer.

    An override of ``forward`` would not be called if a library has put another forward on the layer, and hooks would be
    copied with the model.
    """

    _overlay_state = GATES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if GATES not in self.__dict__:
            # The gates are gone, but this method was kept, as torch.compile(layer) does.
            return type(self).__call__(self, *args, **kwargs)
        opened = [gate for gate in self.__dict__[GATES] if gate.opens_for(self)]
        for gate in opened:
            gate.perturbation.on()
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            for gate in opened:
                gate.perturbation.off()


class ForwardGates:
    """The gates of the layers of one perturbation."""

    def __init__(self) -> None:
        self._gates: dict[nn.Module, ForwardGate] = {}
        # For each pair, the gates of the layers that read it.
        self._of_pairs: list[tuple[LoRAPair, list[ForwardGate]]] = []

    def install(self, perturbation: Perturbation) -> None:
        """Let the layers of a perturbation's pairs read it in their forward, once its average has begun.

        The perturbation must already be installed.
        """
        self.uninstall()
        for pair in perturbation.pairs:
            for layer in _layers_of(pair):
                self._gates.setdefault(layer, ForwardGate(perturbation))
        around: dict[nn.Module, list[ForwardGate]] = defaultdict(list)
        for layer, gate in self._gates.items():
            layer.__dict__.setdefault(GATES, []).append(gate)
            set_class(layer)
            # A layer may read another's factors, as peft's MultiheadAttention reads its output projection's.
            for part in layer.modules():
                around[part].append(gate)
        for pair in perturbation.pairs:
            modules = [*_layers_of(pair), *(as_ref(reader).module for reader in pair.readers)]
            self._of_pairs.append((pair, list(chain.from_iterable(around[module] for module in modules))))

    def uninstall(self) -> None:
        """Give the layers their own classes back."""
        for layer, gate in self._gates.items():
            layer.__dict__[GATES].remove(gate)
            set_class(layer)
        self._gates, self._of_pairs = {}, []

    def note(self, has_opened: bool) -> None:
        """Record for all layers whether they have read the perturbation."""
        for gate in self._gates.values():
            gate.has_opened = has_opened

    def missed(self, received: set[int]) -> list[LoRAPair]:
        """List the pairs whose B received a gradient although no layer has read it perturbed."""
        missed = []
        for pair, gates in self._of_pairs:
            if id(pair.B) in received and not any(gate.has_opened for gate in gates):
                missed.append(pair)
        return missed


class ReceivedGradients:
    """Records which B got a gradient from this rank's backward: neither zeros nor gradients that DDP brings.

    Attributes:
        identities: those of these B, until :meth:`forget`.
    """

    def __init__(self) -> None:
        self.identities: set[int] = set()
        self._count = self._watched = 0
        self._hooks = ExitStack()

    def watch(self, pairs: Iterable[LoRAPair]) -> None:
        """Note from now on which trained B of these pairs receive a gradient."""
        for pair in pairs:
            if pair.B.requires_grad:
                watch: Any = pair.B.register_post_accumulate_grad_hook
                self._hooks.callback(watch(self._note).remove)
                self._watched += 1

    def _note(self, B: nn.Parameter) -> None:
        self.identities.add(id(B))
        self._count += 1
        if self._count == PASSES_UNTIL_WARNING * self._watched:
            rank_zero_warn(
                f"{PASSES_UNTIL_WARNING} backward passes without a step of the optimizer that EFMLoRA or FMLoRA was "
                "made with: make it with the optimizer that the loop steps, or call close() to train without it"
            )

    def forget(self) -> None:
        """Forget the notes, since the gradients are used."""
        self.identities.clear()
        self._count = 0

    def unwatch(self) -> None:
        """Remove the hooks, and forget the notes."""
        self._hooks.close()
        self._watched = 0
        self.forget()


def _layers_of(pair: LoRAPair) -> list[nn.Module]:
    return list(pair.layers) or [as_ref(reader).module for reader in pair.readers]
