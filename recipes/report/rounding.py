"""How a finished adapter withstands rounding to a few bits, before or after it is merged into its base."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from pandas import DataFrame
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_flatlora.flatness import Loss
from lightning_flatlora.flatness.losses import value
from lightning_flatlora.functional import wide
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbed_read import ParameterRef, as_ref

GROUP = 64
"""Neighbouring inputs that share a scale."""
MERGED, AGAIN = "merged, then rounded", "merged into the rounded base, rounded again"
APART, FACTORS, NONE = "base rounded, adapter apart", "adapter rounded, base not", "base rounded, no adapter"
WAYS = (MERGED, AGAIN, APART, FACTORS, NONE)
UPDATE, RATIO = "update", "update / step"


def check_roundable(pairs: Iterable[LoRAPair]) -> None:
    """Refuse an adapter that can't be rounded and merged here.

    Raises:
        ValueError: with the layer that can't be, and why.
    """
    for pair in pairs:
        for layer in pair.layers:
            _base(layer, pair.name)


def _base(layer: Any, name: str) -> tuple[Tensor, ParameterRef, bool]:
    """Return a layer's W0 (..., n, m), float32 or wider, and whether it is stored transposed."""
    module = layer.get_base_layer()
    ref = ParameterRef(module, getattr(layer, "parameter_name", "weight"))
    is_known = isinstance(layer, ParamWrapper) or isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    if layer.lora_variant or not is_known or not ref.parameter.is_floating_point() or ref.parameter.itemsize < 2:
        raise ValueError(
            "--bits rounds Linear, Embedding, Conv1D and experts in 16 bits or more, without DoRA: it can't round the "
            f"{type(module).__name__} under {name}. If the base is quantized, give the one in 16 bits with --base"
        )
    is_transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    stored = wide(ref.parameter.detach())
    return stored.mT if is_transposed else stored, ref, is_transposed


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits - 1 evenly spaced levels around 0, in groups of 64 neighbouring inputs.

    Args:
        weight: shape (..., m), float32 or wider; the last group of a row may be smaller.
        bits: 2 or more.

    Example:
        >>> rounded(torch.tensor([[0.1, 0.6, -1.0]]), bits=2)
        tensor([[ 0.,  1., -1.]])
    """
    step, highest = steps(weight, bits), 2 ** (bits - 1) - 1
    zero = torch.zeros_like(step, dtype=torch.int32)
    levels = torch.fake_quantize_per_channel_affine(_groups(weight), step, zero, 0, -highest, highest)
    return levels.reshape(*weight.shape[:-1], -1)[..., : weight.shape[-1]]


def steps(weight: Tensor, bits: int) -> Tensor:
    """Compute the distance of levels in each group, its largest magnitude / (2^(bits - 1) - 1): float32, (groups,)."""
    step: Tensor = _groups(weight).abs().amax(1) / (2 ** (bits - 1) - 1)
    # A group of zeros would be divided by 0.
    return step.float().clamp_min(torch.finfo(torch.float32).tiny)


def _groups(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, -weight.shape[-1] % GROUP)).reshape(-1, GROUP)


def measure_rounding(loss: Loss, pairs: Sequence[LoRAPair], all_bits: Iterable[int]) -> tuple[DataFrame, DataFrame]:
    """Measure the loss with base, factors or merged weights rounded; all parameters stay the same tensors.

    Args:
        loss: the mean over the examples.
        pairs: the adapter's, which have passed :func:`check_roundable`.
        all_bits: the numbers of bits.

    Returns:
        The losses, a row for each number of bits after one without rounding, and a column for each way. And a row for
        each pair: root mean squares of its update and, in a column for each number of bits, of its base's steps.
    """
    layers = DataFrame({UPDATE: [_rms(_update(pair)) for pair in pairs]}, [pair.name for pair in pairs])
    losses = {"float": {RATIO: math.inf} | {way: _loss(loss, pairs, way, lambda weight: weight) for way in WAYS}}
    for bits in map(str, all_bits):
        layers[bits] = [_rms(steps(_base(pair.layers[0], pair.name)[0], int(bits))) for pair in pairs]
        ratio = (layers[UPDATE] / layers[bits]).median()
        losses[bits] = {RATIO: ratio} | {way: _loss(loss, pairs, way, partial(rounded, bits=int(bits))) for way in WAYS}
    return DataFrame(losses).T, layers


def _loss(loss: Loss, pairs: Iterable[LoRAPair], way: str, near: Callable[[Tensor], Tensor]) -> float:
    """Compute the loss after rounding in one of the ways; the parameters come back even after an error."""
    with ExitStack() as stack:
        for ref, instead in chain.from_iterable(_read_instead(pair, way, near) for pair in pairs):
            # Not the parameter's data, which a tied layer without an adapter reads too.
            stack.callback(ref.module._parameters.__setitem__, ref.name, ref.parameter)
            ref.module._parameters[ref.name] = nn.Parameter(instead.to(ref.parameter.dtype), requires_grad=False)
        return float(value(loss))


def _read_instead(pair: LoRAPair, way: str, near: Callable[[Tensor], Tensor]) -> Iterator[tuple[ParameterRef, Tensor]]:
    """Yield the parameters that one of the ways replaces, with their replacements."""
    if way != FACTORS:
        for layer in pair.layers:
            weight, ref, is_transposed = _base(layer, pair.name)
            if way == AGAIN:
                weight = near(weight)
            if way in (MERGED, AGAIN):
                weight = weight + _update(pair)
            yield ref, near(weight).mT if is_transposed else near(weight)
    if way != APART:
        A, B = [near(wide(factor)) if way == FACTORS else torch.zeros_like(factor) for factor in pair.matrices()]
        stored = A.mT if pair.is_transposed else A.flatten(0, -2)
        yield from ((as_ref(reader), stored) for reader in pair.A_readers)
        yield from ((as_ref(reader), pair.as_stored(B)) for reader in pair.readers)


def _update(pair: LoRAPair) -> Tensor:
    """Return s B A, shape (..., n, m), float32 or wider."""
    A, B = map(wide, pair.matrices())
    return pair.scaling * B @ A


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
