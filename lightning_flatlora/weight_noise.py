"""Gaussian noise on the full weight of every adapted layer, drawn wherever it is read and kept nowhere."""

import copyreg
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.pairs import NoPairsError, bare, clean_name, find_pairs
from lightning_flatlora.schedules import is_radius


class WeightNoise:
    r"""Filter-wise Gaussian noise on W' = W0 + s B A of every adapted Linear layer (Flat-LoRA, Eq. 7).

    .. math:: \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right),
        \qquad y = W' x + \varepsilon x

    so that :math:`\lVert\varepsilon\rVert_F` is about sigma times the weight's own norm, :math:`\lVert W'\rVert_F`.
    While it is on, each layer's base adds :math:`\varepsilon x` to its output. The n x m noise lives inside a layer's
    forward and again inside its backward, from a generator of its own with one seed for each layer: the graph keeps a
    seed and n numbers, the global random state is not touched, and ranks that draw on devices of one kind draw the
    same. W' is never formed: its row norms need W0's, taken once, and r-sized pieces. The cost is two drawings and two
    more products a layer; no pass.

    A backward, too, belongs inside where it computes layers again (activation checkpointing). Stored weights and their
    gradients are nowhere changed. Layers whose adapter is disabled get no noise.

    Attributes:
        names: clean names of the layers that get noise, in the model's order.
        left_out: one line for each kind of adapted layer that gets none, naming it and the reason.

    Args:
        model: a module that contains peft LoRA layers at any depth, not sharded.
        adapter_name: the adapter that enters W'; None takes each layer's active ones.

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

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        if is_sharded(model):
            raise ValueError(
                "noise on a whole weight needs the whole weight, of which FSDP leaves each rank a part: use DDP"
            )
        search = find_pairs(model, adapter_name)
        readers = {id(reader) for pair in search.pairs for reader in pair.readers}
        inside = {
            id(bare(layer.base_layer.out_proj)) for layer in model.modules() if isinstance(layer, MultiheadAttention)
        }
        self.names: list[str] = []
        self._layers: list[_NoisyLayer] = []
        left_out: dict[str, list[str]] = defaultdict(list)
        for name, layer in model.named_modules():
            adapters = _adapters_of(layer, readers)
            if not adapters:
                continue
            if reason := _why_not(layer, adapters, id(layer) in inside):
                left_out[f"{type(layer).__name__}: {reason}"].append(clean_name(name))
            else:
                self._layers.append(_NoisyLayer(layer, adapters, index=len(self._layers)))
                self.names.append(clean_name(name))
        lines = [f"{kind} ({len(names)} in all, first {names[0]})" for kind, names in left_out.items()]
        self.left_out = search.left_out + lines
        if not self._layers:
            raise NoPairsError("no LoRA layer on a Linear to put noise on. Left out: " + "; ".join(self.left_out))

    def on(self, sigma: float, seed: int) -> None:
        """Let the layers compute with W' + noise until :meth:`off`; the row norms are those of the weights now.

        Args:
            sigma: size of the noise relative to each row's norm, no unit, >= 0; 0 adds nothing, bit for bit.
            seed: >= 0; the same seed at the same weights gives the same noise.

        Raises:
            ValueError: a value out of range.
        """
        if not is_radius(sigma):
            raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
        if not is_seed(seed):
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.off()
        for layer in self._layers if sigma > 0 else []:
            layer.on(sigma, seed)

    def off(self) -> None:
        """Let the layers compute with W' alone."""
        for layer in self._layers:
            layer.off()

    @contextmanager
    def applied(self, sigma: float, seed: int) -> Iterator[None]:
        """:meth:`on` inside; after it, whatever happens, :meth:`off`."""
        try:
            self.on(sigma, seed)
            yield
        finally:
            self.off()


class _NoisyLayer:
    """One peft Linear: its base's row norms, and the noise that the base adds to its output."""

    def __init__(self, layer: Any, adapters: list[str], index: int) -> None:
        self._layer, self._adapters, self._index = layer, adapters, index
        self._noise: _Noise | None = None
        self._base_squared = self._base_weight().square().sum(1)

    def on(self, sigma: float, seed: int) -> None:
        columns = self._layer.in_features
        deviations = sigma * (self._squared_norms() / columns).sqrt()
        self._noise = _Noise(self._layer, deviations, derived_seed(seed, self._index))
        _add(self._layer.get_base_layer(), self._noise)

    def off(self) -> None:
        if self._noise is not None:
            _remove(self._layer.get_base_layer(), self._noise)
            self._noise = None

    @torch.no_grad()
    def _squared_norms(self) -> Tensor:
        """||W0_i||^2 + 2 B_i (W0 A^T)_i + B_i A A^T B_i^T of every row i, with s in B, shape (n,)."""
        W0 = self._base_weight()
        with torch.autocast(W0.device.type, enabled=False):
            A, B = (torch.cat([factor.to(W0.dtype) for factor in each]) for each in self._factors())
            B = B.mT
            cross = (B * (W0 @ A.mT)).sum(1)
            squared = self._base_squared.to(W0.device) + 2 * cross + ((B @ (A @ A.mT)) * B).sum(1)
        return squared.clamp_min(0)

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """A (r, m) and s B^T (r, n) of every adapter, whose updates add up."""
        layer = self._layer
        A = [bare(layer.lora_A[name]).weight for name in self._adapters]
        B = [bare(layer.lora_B[name]).weight.mT * layer.scaling[name] for name in self._adapters]
        return A, B

    def _base_weight(self) -> Tensor:
        weight: Tensor = bare(self._layer.get_base_layer()).weight.detach()
        weight = weight.mT if self._layer.fan_in_fan_out else weight  # as the Conv1D of transformers keeps it
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


class _Noise:
    """What a base layer adds to its output: noise times its input, in the dtype that it computed in."""

    def __init__(self, layer: Any, deviations: Tensor, seed: int) -> None:
        self._layer, self._deviations = layer, deviations
        self._seed = torch.tensor(np.array(seed, np.uint64).astype(np.int64))  # a number would be compiled in

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        if self._layer.disable_adapters:
            return output
        noisy: Tensor = _noise_product(x.to(output.dtype), self._deviations, self._seed, x.shape[-1], False)
        return output + noisy


class _AddsNoise:
    """Mixin before a base layer's own class while there is noise on it.

    A compiled network has one graph for each class of a module, and makes one where it meets a new class. It
    would ignore a hook added after the first call, and would keep for ever what an earlier hook refers to.
    """

    _noises: list[_Noise]
    _plain_class: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for noise in self._noises:
            output = noise.added(x, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy of the model adds nothing."""
        state = {key: value for key, value in self.__dict__.items() if key != "_noises"}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


@cache
def _noisy_class(plain: Any) -> Any:
    return type(f"Noisy{plain.__name__}", (_AddsNoise, plain), {"_plain_class": plain})


def _add(module: Any, noise: _Noise) -> None:
    if not isinstance(module, _AddsNoise):
        module.__dict__["_noises"] = []
        plain: Any = type(module)
        module.__class__ = _noisy_class(plain)
    module._noises.append(noise)


def _remove(module: Any, noise: _Noise) -> None:
    module._noises.remove(noise)
    if not module._noises:
        module.__class__ = module._plain_class
        del module.__dict__["_noises"]


@torch.library.custom_op("lightning_flatlora::noise_product", mutates_args=())
def _noise_product(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool) -> Tensor:
    """x (..., m) times the transposed noise, or x (..., n) times the noise, which is drawn again at every call.

    One operator, whose inside a compiler does not see: it draws from a generator.
    """
    noise = _noise(deviations, columns, int(seed) % 2**64).to(x.dtype)
    return x @ (noise if transposed else noise.mT)


@_noise_product.register_fake
def _(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else deviations.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, deviations, seed, ctx.columns, ctx.transposed = inputs
    ctx.save_for_backward(deviations, seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    deviations, seed = ctx.saved_tensors
    return _noise_product(grad, deviations, seed, ctx.columns, not ctx.transposed), None, None, None, None


_noise_product.register_autograd(_gradient, setup_context=_save)


def _noise(deviations: Tensor, columns: int, seed: int) -> Tensor:
    """Gaussian rows of given standard deviations, shape (n, m), from a generator of their own."""
    generator = torch.Generator(deviations.device).manual_seed(seed)
    shape = (len(deviations), columns)
    normal = torch.randn(shape, generator=generator, dtype=deviations.dtype, device=deviations.device)
    return normal.mul_(deviations[:, None])


def derived_seed(seed: int, index: int) -> int:
    """A seed of 64 bits for each pair of numbers, unlike its neighbours'.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def is_seed(value: object) -> bool:
    """Whether a value can be a seed: an integer >= 0.

    Example:
        >>> is_seed(0), is_seed(2**40), is_seed(-1), is_seed(1.0), is_seed(True)
        (True, True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _adapters_of(layer: Any, readers: set[int]) -> list[str]:
    """The adapters of a LoRA layer that belong to a pair that was found."""
    if not isinstance(layer, LoraLayer):
        return []
    return [name for name, factor in layer.lora_B.items() if id(bare(factor)) in readers]


def _why_not(layer: Any, adapters: list[str], in_attention: bool) -> str | None:
    """The reason for which no noise can be put on a layer's weight; None if it can."""
    base = bare(layer.get_base_layer())
    if not isinstance(layer, Linear) or not (isinstance(base, nn.Linear) or layer.fan_in_fan_out):
        return f"its base, a {type(base).__name__}, is no plain Linear"
    if not base.weight.is_floating_point():
        return "its base is quantised"
    if any(layer.lora_variant.get(name) is not None for name in adapters):
        return "a variant of LoRA (as DoRA) reads the base weight itself"
    if "forward" in vars(base):
        return "its base's forward was replaced (as by accelerate)"
    if in_attention:
        return "nn.MultiheadAttention reads the weight itself"
    return None
