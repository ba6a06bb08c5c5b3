"""Linear layers under adapters, and terms that they temporarily add to their output, such as noise."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora.class_overlay import Overlay, set_class
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError
from lightning_flatlora.pairs.peft_pairs import lora_layers
from lightning_flatlora.wrappers import bare, clean_name

_TERMS = "_flatlora_terms"


@dataclass(eq=False)
class OutputTerm(ABC):
    """A Linear under adapters, and a term that it adds to its output while the term is on.

    Attributes:
        names: clean names of the peft layer, or of a finder's pairs on it.
        base: the Linear, which a policy may have wrapped.
        pairs: its adapters.
        layer: the peft layer around the base, if there is one.
    """

    names: list[str]
    base: Any
    pairs: list[LoRAPair]
    layer: Any = None

    @abstractmethod
    def term(self, x: Tensor) -> Tensor:
        """Compute the term for an input, in the dtype of the layer's output."""

    @property
    def weight(self) -> Tensor:
        """W0, shape (n, m)."""
        weight: Tensor = bare(self.base).weight.detach()
        # Transposed if stored so, as by transformers' Conv1D.
        return weight.mT if self.layer is not None and self.layer.fan_in_fan_out else weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and s B (n, r) of all its adapters, concatenated so that their updates add up."""
        n = len(self.weight)
        of_A, of_B = [], []
        for pair in self.pairs:
            A, B = pair.matrices()
            # A finder's pair may cover only some rows.
            rows = pair.base_rows or range(n)
            of_A.append(A)
            of_B.append(F.pad(B.mT * pair.scaling, (rows.start, n - rows.stop)))
        return torch.cat(of_A), torch.cat(of_B).mT

    def on(self) -> None:
        """Let the layer add the term until :meth:`off`."""
        terms: list[OutputTerm] = self.base.__dict__.setdefault(_TERMS, [])
        if self not in terms:
            terms.append(self)
            set_class(self.base)

    def off(self) -> None:
        """Let the layer stop adding the term."""
        terms: list[OutputTerm] = self.base.__dict__.get(_TERMS, [])
        if self in terms:
            terms.remove(self)
            set_class(self.base)


Term = TypeVar("Term", bound=OutputTerm)


class _Adding(Overlay):
    """Mixin that comes before a layer's own class while the layer adds terms to its output.

    A compiled network makes a graph for each new class of a module. A hook would not do: one added after the first call
    is ignored, and the objects of an earlier one are kept forever.
    """

    _overlay_state = _TERMS

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for term in self.__dict__[_TERMS]:
            # With disabled adapters the caller wants only the base, such as a reference model's logits.
            if term.layer is None or not term.layer.disable_adapters:
                output = output + term.term(x.to(output.dtype))
        return output


def output_terms(
    kind: type[Term], model: nn.Module, adapter_name: str | None, finder: Finder | None
) -> tuple[list[Term], list[str]]:
    """Make a term for each Linear under a model's trained adapters, in the order of its modules.

    Returns:
        The terms, and one line for each kind of adapted layer without one, with the reason.

    Raises:
        NoPairsError: there is none; the message lists the layers seen.
    """
    search = find_pairs(model, adapter_name, finder=finder)
    terms: list[Term] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for reason, names, *parts in _candidates(model, search.pairs, finder):
        if reason is None:
            terms.append(kind(names, *parts))
        else:
            left_out[reason] += names
    lines = [f"{reason} ({len(names)} in all, first {names[0]})" for reason, names in left_out.items()]
    lines = search.left_out + lines
    if not terms:
        raise NoPairsError("no LoRA layer on a Linear to perturb as a whole. Left out: " + "; ".join(lines))
    return terms, lines


def _candidates(model: nn.Module, pairs: Sequence[LoRAPair], finder: Finder | None) -> Iterator[tuple[Any, ...]]:
    """Yield for each base why it can't have a term, if it can't, and the attributes of its :class:`OutputTerm`."""
    if finder is None:
        for name, layer, of_layer in adapted_layers(model, pairs):
            reason = _why_not(layer)
            if reason is None and isinstance(bare(model.get_submodule(name.rpartition(".")[0])), nn.MultiheadAttention):
                reason = "nn.MultiheadAttention reads the weight itself"
            reason = reason and f"{type(layer).__name__}: {reason}"
            yield reason, [clean_name(name)], layer.get_base_layer(), of_layer, layer
        return
    by_base: dict[nn.Module | None, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    for base, of_base in by_base.items():
        is_plain = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        reason = None if is_plain else "the finder does not name a plain Linear as their base"
        yield reason, [pair.name for pair in of_base], base, of_base


def adapted_layers(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[tuple[str, Any, list[LoRAPair]]]:
    """Yield the peft layers that read any of the pairs, each with its name and its pairs."""
    by_layer: dict[nn.Module, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        for layer in pair.layers:
            by_layer[layer].append(pair)
    for name, layer in lora_layers(model):
        if layer in by_layer:
            yield name, layer, by_layer[layer]


def _why_not(layer: Any) -> str | None:
    """Return why nothing can be added to the output of a layer's base; None if it can."""
    base = bare(layer.get_base_layer())
    if not isinstance(layer, Linear) or not (isinstance(base, nn.Linear) or layer.fan_in_fan_out):
        return f"its base, a {type(base).__name__}, is not a plain Linear"
    if not base.weight.is_floating_point():
        return "its base is quantized"
    if any(layer.lora_variant.get(name) is not None for name in layer.active_adapters):
        return "a variant of LoRA (such as DoRA) reads the base weight itself"
    if "forward" in vars(base):
        return "its base's forward was replaced (for example by accelerate)"
    return None
