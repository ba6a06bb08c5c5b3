"""The Linear layers under adapters, and terms that they add to their output for a while, such as noise."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora.class_overlay import Overlay, set_class
from lightning_flatlora.pairs import bare, clean_name, find_pairs, lora_layers
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError

_TERMS = "_flatlora_terms"


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """A Linear under adapters, to whose output a further term can be added.

    Attributes:
        names: clean names of the layer of peft, or of a finder's pairs on it.
        base: the Linear, around which a policy may have put a wrapper.
        pairs: its adapters.
        layer: the layer of peft around the base, if it is one.
    """

    names: list[str]
    base: Any
    pairs: list[LoRAPair]
    layer: Any = None

    @property
    def weight(self) -> Tensor:
        """W0, shape (n, m)."""
        weight: Tensor = bare(self.base).weight.detach()
        # Such as the Conv1D of transformers, which stores the transpose.
        return weight.mT if self.layer is not None and self.layer.fan_in_fan_out else weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and s B (n, r) of all its adapters side by side, so that their updates add up."""
        n = len(self.weight)
        of_A, of_B = [], []
        for pair in self.pairs:
            A, B = pair.matrices()
            # A finder's pair may be of some rows only.
            rows = pair.base_rows or range(n)
            of_A.append(A)
            of_B.append(F.pad(B.mT * pair.scaling, (rows.start, n - rows.stop)))
        return torch.cat(of_A), torch.cat(of_B).mT


class OutputTerm(ABC):
    """A term that an adapted Linear adds to its output while the term is on.

    Args:
        linear: the layer.
    """

    def __init__(self, linear: AdaptedLinear) -> None:
        self.linear = linear

    @abstractmethod
    def term(self, x: Tensor) -> Tensor:
        """Compute the term for an input in the dtype of the layer's output."""

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output for an input, with the term."""
        layer = self.linear.layer
        # With disabled adapters only the base is wanted, as for a reference model's logits.
        if layer is not None and layer.disable_adapters:
            return output
        return output + self.term(x.to(output.dtype))

    def on(self) -> None:
        """Let the layer add the term until :meth:`off`."""
        terms: list[OutputTerm] = self.linear.base.__dict__.setdefault(_TERMS, [])
        if self not in terms:
            terms.append(self)
            set_class(self.linear.base)

    def off(self) -> None:
        """Let the layer no longer add the term."""
        terms: list[OutputTerm] = self.linear.base.__dict__.get(_TERMS, [])
        if self in terms:
            terms.remove(self)
            set_class(self.linear.base)


class _AddsTerms(Overlay):
    """Mixin before a layer's own class while it adds terms to its output.

    A compiled network has one graph for each class of a module, and makes one when it meets a new class. It
    would ignore a hook added after the first call, and would keep forever what an earlier hook refers to.
    """

    _overlay_prefix = "Adding"
    _overlay_state = _TERMS

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for term in self.__dict__[_TERMS]:
            output = term.added(x, output)
        return output


def adapted_linears(
    model: nn.Module, adapter_name: str | None, finder: Finder | None
) -> tuple[list[AdaptedLinear], list[str]]:
    """Find the Linear layers under the trained adapters of a model, which is not sharded, in the order of its modules.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the adapter of peft to look at; None takes each layer's active ones.
        finder: says what the pairs are if the layers are not peft's, and what their base is.

    Returns:
        The layers, and one line for each kind of adapted layer that is none of them, naming it and the reason.

    Raises:
        NoPairsError: there is none; the message lists what was seen.
        ValueError: no adapter of that name.
    """
    search = find_pairs(model, adapter_name, finder=finder)
    candidates = _on_layers_of_peft(model, search.pairs) if finder is None else _on_bases(search.pairs)
    linears: list[AdaptedLinear] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for linear, reason in candidates:
        if reason is None:
            linears.append(linear)
        else:
            left_out[reason] += linear.names
    lines = [f"{reason} ({len(names)} in all, first {names[0]})" for reason, names in left_out.items()]
    lines = search.left_out + lines
    if not linears:
        raise NoPairsError("no LoRA layer on a Linear to perturb as a whole. Left out: " + "; ".join(lines))
    return linears, lines


def _on_bases(pairs: Sequence[LoRAPair]) -> Iterator[tuple[AdaptedLinear, str | None]]:
    """Group a finder's pairs by their base, and say why nothing can be added to its output, if so."""
    by_base: dict[nn.Module | None, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    for base, of_base in by_base.items():
        is_plain = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        reason = None if is_plain else "the finder names no plain Linear as their base"
        yield AdaptedLinear([pair.name for pair in of_base], base, of_base), reason


def _on_layers_of_peft(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[tuple[AdaptedLinear, str | None]]:
    """Group peft's pairs by the layer that reads them, and say why nothing can be added to its output, if so."""
    for name, layer, of_layer in adapted_layers(model, pairs):
        reason = _why_not(layer)
        if reason is None and isinstance(bare(model.get_submodule(name.rpartition(".")[0])), nn.MultiheadAttention):
            reason = "nn.MultiheadAttention reads the weight itself"
        linear = AdaptedLinear([clean_name(name)], layer.get_base_layer(), of_layer, layer)
        yield linear, reason and f"{type(layer).__name__}: {reason}"


def adapted_layers(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[tuple[str, Any, list[LoRAPair]]]:
    """Yield the layers of peft that read some pairs, each with its name and these pairs."""
    read_by: dict[int, LoRAPair] = {}
    for pair in pairs:
        for reader in pair.readers:
            read_by[id(reader)] = pair
    for name, layer in lora_layers(model):
        readers = [id(bare(factor)) for factor in layer.lora_B.values()]
        of_layer = [read_by[reader] for reader in readers if reader in read_by]
        if of_layer:
            yield name, layer, of_layer


def _why_not(layer: Any) -> str | None:
    """Give the reason for which nothing can be added to the output of a layer's base; None if it can."""
    base = bare(layer.get_base_layer())
    if not isinstance(layer, Linear) or not (isinstance(base, nn.Linear) or layer.fan_in_fan_out):
        return f"its base, a {type(base).__name__}, is no plain Linear"
    if not base.weight.is_floating_point():
        return "its base is quantized"
    if any(layer.lora_variant.get(name) is not None for name in layer.active_adapters):
        return "a variant of LoRA (such as DoRA) reads the base weight itself"
    if "forward" in vars(base):
        return "its base's forward was replaced (for example by accelerate)"
    return None
