"""Gaussian noise on the full weight of every adapted layer, drawn whenever it is needed and never stored."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_flatlora.layer_noise import noise_product
from lightning_flatlora.output_terms import OutputTerm
from lightning_flatlora.pairs import bare, clean_name, find_pairs, lora_layers
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError
from lightning_flatlora.schedules import is_integer, is_size
from lightning_flatlora.sharding import is_sharded


class WeightNoise:
    r"""Filter-wise Gaussian noise on W' = W0 + s B A of every adapted Linear layer (Flat-LoRA, Eq. 7).

    .. math:: \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right),
        \qquad y = W' x + \varepsilon x

    so that :math:`\lVert\varepsilon\rVert_F` is about sigma times the weight's own norm, :math:`\lVert W'\rVert_F`.
    While the noise is on, each layer's base adds :math:`\varepsilon x` to its output. The n x m noise exists only
    inside a layer's forward and again inside its backward. It is drawn from its own generator, with one seed for
    each layer: the graph keeps a seed and n numbers, the global random state is not touched, and ranks on devices of
    the same kind draw the same noise. W' is never formed, since its row norms need only those of W0, which are taken
    once, and pieces of size r. The cost is two draws and two more products for each layer, and no further pass.

    If a backward computes layers again (activation checkpointing), it must run while the noise is on. Stored weights
    and their gradients are never changed. Layers whose adapter is disabled get no noise.

    Attributes:
        names: clean names of the layers that get noise, in the model's order.
        left_out: one line for each kind of adapted layer that gets none, naming it and the reason.

    Args:
        model: a module that contains peft LoRA layers at any depth, not sharded.
        adapter_name: the adapter that enters W'; None takes each layer's active ones.
        finder: says what the pairs are if the layers are not peft's, and what their base is.

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
        for linear in linears:
            self.names += linear.names
        self._layers = [_NoisyLayer(linear) for linear in linears]
        self._drawn: list[_NoisyLayer] = []

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
        if not is_integer(seed, least=0):
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        # Noise that is still on, from another seed, would be added to the new one.
        self.off()
        if sigma == 0:
            return
        for index, layer in enumerate(self._layers):
            layer.draw(sigma, derived_seed(seed, index))
        self._drawn = self._layers
        self.on_again()

    def on_again(self) -> None:
        """Let the layers compute with the noise that they had last."""
        for layer in self._drawn:
            layer.on()

    def off(self) -> None:
        """Let the layers compute with W' only."""
        for layer in self._layers:
            layer.off()

    @contextmanager
    def applied(self, sigma: float, seed: int) -> Iterator[None]:
        """Switch the noise on; afterwards, whatever happens, it is off."""
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
        pairs: its adapters.
        layer: the layer of peft around the base, if it is one.
    """

    names: list[str]
    base: Any
    pairs: list[LoRAPair]
    layer: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) of its weight."""
        owner = self.base if self.layer is None else self.layer
        return owner.out_features, owner.in_features

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and s B (n, r) of all its adapters side by side, so that their updates add up."""
        n = self.shape[0]
        of_A, of_B = [], []
        for pair in self.pairs:
            A, B = pair.matrices()
            # A finder's pair may be of some rows only.
            rows = pair.base_rows or range(n)
            of_A.append(A)
            of_B.append(F.pad(B.mT * pair.scaling, (rows.start, n - rows.stop)))
        return torch.cat(of_A), torch.cat(of_B).mT


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
        if reason:
            left_out[reason] += linear.names
        else:
            linears.append(linear)
    lines = [f"{reason} ({len(names)} in all, first {names[0]})" for reason, names in left_out.items()]
    lines = search.left_out + lines
    if not linears:
        raise NoPairsError("no LoRA layer on a Linear to perturb as a whole. Left out: " + "; ".join(lines))
    return linears, lines


_Candidates = Iterator[tuple[AdaptedLinear, str | None]]
"""Adapted layers, each with the reason for which nothing can be added to its output; None if it can."""


def _on_bases(pairs: Sequence[LoRAPair]) -> _Candidates:
    """Group the pairs of a finder by their base: several if its weight holds several projections."""
    by_base: dict[nn.Module | None, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    for base, of_base in by_base.items():
        is_plain = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        reason = None if is_plain else "the finder names no plain Linear as their base"
        yield AdaptedLinear([pair.name for pair in of_base], base, of_base), reason


def _on_layers_of_peft(model: nn.Module, pairs: Sequence[LoRAPair]) -> _Candidates:
    """Group the pairs of peft by the layer that reads them."""
    for name, layer, adapters in adapted_layers(model, pairs):
        parent = model.get_submodule(name.rpartition(".")[0])
        reason = _why_not(layer, adapters, isinstance(bare(parent), nn.MultiheadAttention))
        linear = AdaptedLinear([clean_name(name)], layer.get_base_layer(), list(adapters.values()), layer)
        yield linear, reason and f"{type(layer).__name__}: {reason}"


class _NoisyLayer(OutputTerm):
    """One Linear: its base's row norms, and the noise that the base adds to its output."""

    def __init__(self, linear: AdaptedLinear) -> None:
        super().__init__(linear.base, linear.layer)
        self._linear = linear

    def draw(self, sigma: float, seed: int) -> None:
        """Set the noise, whose size is that of the weights as they are now."""
        self._deviations = sigma * (self._squared_norms() / self._linear.shape[1]).sqrt()
        # A tensor, since torch.compile would build a plain number into the graph and compile again for every seed.
        self._seed = torch.tensor(np.array(seed, np.uint64).astype(np.int64))

    @override
    def term(self, x: Tensor) -> Tensor:
        noisy: Tensor = noise_product(x, self._deviations, self._seed, x.shape[-1])
        return noisy

    @cached_property
    def _base_squared(self) -> Tensor:
        """Compute ||W0_i||^2 of every row i: only once, since the base is frozen and this reads all of it."""
        return self._base_weight().square().sum(1)

    @torch.no_grad()
    def _squared_norms(self) -> Tensor:
        """Compute ||W0_i||^2 + 2 B_i (W0 A^T)_i + B_i A A^T B_i^T of every row i, with s in B, shape (n,)."""
        W0 = self._base_weight()
        # Under autocast the products would be rounded to 16 bits, and small norms with them.
        with torch.autocast(W0.device.type, enabled=False):
            A, B = (factor.to(W0.dtype) for factor in self._linear.factors())
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
    """Derive a seed of 64 bits from a pair of numbers, unlike its neighbours'.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
        (True, False)
    """
    # A sum of the two numbers would give the same seeds to neighbouring steps and layers.
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def adapted_layers(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[tuple[str, Any, dict[str, LoRAPair]]]:
    """Yield the layers of peft that read some pairs, each with its name and these pairs by adapter."""
    read_by: dict[int, LoRAPair] = {}
    for pair in pairs:
        for reader in pair.readers:
            read_by[id(reader)] = pair
    for name, layer in lora_layers(model):
        readers = {adapter: id(bare(factor)) for adapter, factor in layer.lora_B.items()}
        adapters = {adapter: read_by[reader] for adapter, reader in readers.items() if reader in read_by}
        if adapters:
            yield name, layer, adapters


def _why_not(layer: Any, adapters: Iterable[str], in_attention: bool) -> str | None:
    """Give the reason for which no noise can be put on a layer's weight; None if it can."""
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
