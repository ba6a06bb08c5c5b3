"""Noise that one base layer adds to its output: one operator draws it again in every forward and backward."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class LayerNoise:
    """What a base layer adds to its output: noise times its input, in the dtype that it computed in."""

    def __init__(self, layer: Any, deviations: Tensor, seed: int) -> None:
        self._layer, self._deviations = layer, deviations
        # A tensor, since torch.compile would build a plain number into the graph and compile again for every seed.
        self._seed = torch.tensor(np.array(seed, np.uint64).astype(np.int64))

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output for an input, with the noise."""
        # With disabled adapters the base alone is wanted, as for a reference model's logits.
        if self._layer is not None and self._layer.disable_adapters:
            return output
        noisy: Tensor = _noise_product(x.to(output.dtype), self._deviations, self._seed, x.shape[-1], False)
        return output + noisy


@torch.library.custom_op("lightning_flatlora::noise_product", mutates_args=())
def _noise_product(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool) -> Tensor:
    """x (..., m) times the transposed noise, or x (..., n) times the noise, which is drawn again at every call.

    One operator, whose inside a compiler does not see: it draws from a generator.
    """
    # The tensor is signed, a seed is not.
    noise = _noise(deviations, columns, int(seed) % 2**64).to(x.dtype)
    return x @ (noise if transposed else noise.mT)


@_noise_product.register_fake
def _(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else deviations.shape[0])


# The noise itself is not saved for the backward, which draws it again from the seed.
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
