"""Gaussian noise on the full weight of every adapted layer, drawn whenever it is needed and never stored."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.layer_noise import LayerNoise
from lightning_flatlora.output_terms import add_term, remove_term
from lightning_flatlora.pairs import bare, clean_name, find_pairs, lora_layers
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError, readers_of
from lightning_flatlora.schedules import is_size

Factors = list[tuple[Tensor, Tensor]]
"""A (r, m) and s B^T (r, n) of every adapter of a layer, whose updates add up."""


class WeightNoise:
    r"""Filter-wise Gaussian noise on W' = W0 + s B A of every adapted Linear layer (Flat-LoRA, Eq. 7).

    .. math:: \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right),
        \qquad y = W' x + \varepsilon x

    so that :math:`\lVert\varepsilon\rVert_F` is about sigma times the weight's own norm, :math:`\lVert W'\rVert_F`.
    While the noise is on, each layer's base adds :math:`\varepsilon x` to its output. The n x m noise exists only
    inside a layer's forward and again inside its backward. It is drawn from a generator of its own, with one seed for
    each layer: the graph keeps a seed and n numbers, the global random state is not touched, and ranks on devices of
    the same kind draw the same noise. W' is never formed, since its row norms need only those of W0, which are taken
    once, and pieces of size r. The cost is two draws and two more products for each layer, and no further pass.

    Where a backward computes layers again (activation checkpointing), it must run while the noise is on. Stored weights
    and their gradients are never changed. Layers whose adapter is disabled get no noise.

    Attributes:
        names: clean names of the layers that get noise, in the model's order.
        left_out: one line for each kind of adapted layer that gets none, naming it and the reason.

    Args:
        model: a module that contains peft LoRA layers at any depth, not sharded.
        adapter_name: the adapter that enters W'; None takes each layer's active ones.
        finder: says what the pairs are where the layers are not peft's, and what their base is.

    Raises:
        NoPairsError: no LoRA layer on a Linear is trained; the message lists what was seen.
        ValueError: no adapter of that name, or a model of which each rank holds a part.

    Source: Li et al., arXiv 2409.14396, Eq. 7, where m is the dimension of the layer's input.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> noise, x = WeightNoise(model), torch.ones(5, 4)
        >>> clean = model(x)
        >>> with noise.applied(sigma=0.1, seed=7):
        ...     first, second = model(x), model(x)
        >>> bool((first == second).all()), bool((first == clean).any()), bool((model(x) == clean).all())
        (True, False, True)
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None, *, finder: Finder | None = None) -> None:
        if is_sharded(model):
            raise ValueError(
                "noise on a whole weight needs the whole weight, of which FSDP leaves each rank a part: use DDP"
            )
        linears, self.left_out = adapted_linears(model, adapter_name, finder)
        self.names: list[str] = []
        self._layers: list[_NoisyLayer] = []
        for index, linear in enumerate(linears):
            self.names += linear.names
            self._layers.append(_NoisyLayer(linear, index))

    def on(self, sigma: float, seed: int) -> None:
        """Let the layers compute with W' + noise until :meth:`off`; the row norms are those of the weights now.

        Args:
            sigma: size of the noise relative to each row's norm, no unit, >= 0; 0 adds nothing, bit for bit.
            seed: >= 0; the same seed at the same weights gives the same noise.

        Raises:
            ValueError: a value out of range.
        """
        if not is_size(sigma):
            raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
        integer: object = seed  # also NumPy's integers, of which none is an int
        if isinstance(integer, bool) or not isinstance(integer, Integral) or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        # Noise that is still on, from another seed, would be added to the new one.
        self.off()
        if sigma == 0:
            return
        for layer in self._layers:
            layer.on(sigma, seed)

    def on_again(self) -> None:
        """Let the layers compute with the noise that they had last."""
        for layer in self._layers:
            layer.on_again()

    def off(self) -> None:
        """Let the layers compute with W' only."""
        for layer in self._layers:
            layer.off()

    @contextmanager
    def applied(self, sigma: float, seed: int) -> Iterator[None]:
        """Inside, the noise is on; afterwards, whatever happens, it is off."""
        try:
            self.on(sigma, seed)
            yield
        finally:
            self.off()


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """A Linear under adapters, to whose output a further term can be added.

    Attributes:
        names: clean names of the layer of peft, or of a finder's pairs on it.
        base: the Linear, around which a policy may have put a wrapper.
        factors: gives those of its adapters as they are now.
        layer: the layer of peft around the base, if it is one.
    """

    names: list[str]
    base: Any
    factors: Callable[[], Factors]
    layer: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) of its weight."""
        owner = self.base if self.layer is None else self.layer
        return owner.out_features, owner.in_features


def adapted_linears(
    model: nn.Module, adapter_name: str | None, finder: Finder | None
) -> tuple[list[AdaptedLinear], list[str]]:
    """The Linear layers under the trained adapters of a model, which is not sharded, in the order of its modules.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the adapter of peft to look at; None takes each layer's active ones.
        finder: says what the pairs are where the layers are not peft's, and what their base is.

    Returns:
        The layers, and one line for each kind of adapted layer that is none of them, naming it and the reason.

    Raises:
        NoPairsError: there is none; the message lists what was seen.
        ValueError: no adapter of that name.
    """
    search = find_pairs(model, adapter_name, finder=finder)
    found, of_peft = (search.pairs, []) if finder is not None else ([], search.pairs)
    in_attention = set()
    for layer in model.modules():
        if isinstance(layer, MultiheadAttention):
            in_attention.add(id(bare(layer.base_layer.out_proj)))
    linears: list[AdaptedLinear] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for base, pairs in _by_base(found).items():
        names = [pair.name for pair in pairs]
        if isinstance(base, nn.Linear) and base.weight.is_floating_point():
            linears.append(AdaptedLinear(names, base, partial(_factors_found, base, pairs)))
        else:
            left_out["the finder names no plain Linear as their base"] += names
    for name, layer, adapters in adapted_layers(model, of_peft):
        reason = _why_not(layer, adapters, id(layer) in in_attention)
        if reason:
            left_out[f"{type(layer).__name__}: {reason}"].append(clean_name(name))
        else:
            factors = partial(_factors_of_peft, layer, adapters)
            linears.append(AdaptedLinear([clean_name(name)], layer.get_base_layer(), factors, layer))
    lines = [f"{kind} ({len(names)} in all, first {names[0]})" for kind, names in left_out.items()]
    lines = search.left_out + lines
    if not linears:
        raise NoPairsError("no LoRA layer on a Linear to perturb as a whole. Left out: " + "; ".join(lines))
    return linears, lines


def _by_base(pairs: list[LoRAPair]) -> dict[nn.Module | None, list[LoRAPair]]:
    """The pairs of each base: several where its weight holds several projections."""
    by_base: dict[nn.Module | None, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    return by_base


def _factors_found(base: nn.Linear, pairs: list[LoRAPair]) -> Factors:
    """Those of a finder's pairs on one base, of whose rows a pair may be some."""
    factors = []
    for pair in pairs:
        A, B = pair.matrices()
        rows = pair.base_rows or range(base.out_features)
        factors.append((A, F.pad(B.mT * pair.scaling, (rows.start, base.out_features - rows.stop))))
    return factors


def _factors_of_peft(layer: Any, adapters: list[str]) -> Factors:
    """Those of one of peft's layers, with the scaling that it has now."""
    factors = []
    for name in adapters:
        factors.append((bare(layer.lora_A[name]).weight, bare(layer.lora_B[name]).weight.mT * layer.scaling[name]))
    return factors


class _NoisyLayer:
    """One Linear: its base's row norms, and the noise that the base adds to its output."""

    def __init__(self, linear: AdaptedLinear, index: int) -> None:
        self._linear, self._index = linear, index
        self._noise: LayerNoise | None = None
        self._is_on = False

    def on(self, sigma: float, seed: int) -> None:
        deviations = sigma * (self._squared_norms() / self._linear.shape[1]).sqrt()
        self._noise = LayerNoise(self._linear.layer, deviations, derived_seed(seed, self._index))
        self.on_again()

    def on_again(self) -> None:
        if self._noise is not None and not self._is_on:
            add_term(self._linear.base, self._noise)
            self._is_on = True

    def off(self) -> None:
        if self._noise is not None and self._is_on:
            remove_term(self._linear.base, self._noise)
            self._is_on = False

    @cached_property
    def _base_squared(self) -> Tensor:
        """||W0_i||^2 of every row i: taken once, since the base is frozen and this reads all of it."""
        return self._base_weight().square().sum(1)

    @torch.no_grad()
    def _squared_norms(self) -> Tensor:
        """||W0_i||^2 + 2 B_i (W0 A^T)_i + B_i A A^T B_i^T of every row i, with s in B, shape (n,)."""
        W0 = self._base_weight()
        # Under autocast the products would be rounded to 16 bits, and small norms with them.
        with torch.autocast(W0.device.type, enabled=False):
            factors = self._linear.factors()
            A = torch.cat([A.to(W0.dtype) for A, _ in factors])
            B = torch.cat([B.to(W0.dtype) for _, B in factors]).mT
            cross = (B * (W0 @ A.mT)).sum(1)
            squared = self._base_squared.to(W0.device) + 2 * cross + ((B @ (A @ A.mT)) * B).sum(1)
        return squared.clamp_min(0)

    def _base_weight(self) -> Tensor:
        weight: Tensor = bare(self._linear.base).weight.detach()
        # Such as the Conv1D of transformers, which stores the transpose.
        if self._linear.layer is not None and self._linear.layer.fan_in_fan_out:
            weight = weight.mT
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


def derived_seed(seed: int, index: int) -> int:
    """A seed of 64 bits for each pair of numbers, unlike its neighbours'.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
        (True, False)
    """
    # A sum of the two numbers would give the same seeds to neighbouring steps and layers.
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def adapted_layers(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[tuple[str, Any, list[str]]]:
    """The layers of peft that read some pairs, each with its name and the adapters that belong to the pairs."""
    readers = {id(reader) for reader in readers_of(pairs)}
    for name, layer in lora_layers(model):
        adapters = [adapter for adapter, factor in layer.lora_B.items() if id(bare(factor)) in readers]
        if adapters:
            yield name, layer, adapters


def _why_not(layer: Any, adapters: list[str], in_attention: bool) -> str | None:
    """The reason for which no noise can be put on a layer's weight; None if it can."""
    base = bare(layer.get_base_layer())
    if not isinstance(layer, Linear) or not (isinstance(base, nn.Linear) or layer.fan_in_fan_out):
        return f"its base, a {type(base).__name__}, is no plain Linear"
    if not base.weight.is_floating_point():
        return "its base is quantized"
    if any(layer.lora_variant.get(name) is not None for name in adapters):
        return "a variant of LoRA (such as DoRA) reads the base weight itself"
    if "forward" in vars(base):
        return "its base's forward was replaced (for example by accelerate)"
    if in_attention:
        return "nn.MultiheadAttention reads the weight itself"
    return None
