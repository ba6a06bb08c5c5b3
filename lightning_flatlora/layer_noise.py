"""Noise times an input, as one operator that draws the noise again in every forward and backward."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lightning_flatlora::noise_product", mutates_args=())
def noise_product(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool = False) -> Tensor:
    """Multiply x (..., m) by the transposed noise, or x (..., n) by the noise, whose rows have given deviations.

    One operator, whose inside a compiler does not see: it draws from a generator.
    """
    # The tensor is signed, a seed is not.
    generator = torch.Generator(deviations.device).manual_seed(int(seed) % 2**64)
    shape = (len(deviations), columns)
    normal = torch.randn(shape, generator=generator, dtype=deviations.dtype, device=deviations.device)
    noise = normal.mul_(deviations[:, None]).to(x.dtype)
    return x @ (noise if transposed else noise.mT)


@noise_product.register_fake
def _(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else deviations.shape[0])


# The noise itself is not saved for the backward, which draws it again from the seed.
def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, deviations, seed, ctx.columns, ctx.transposed = inputs
    ctx.save_for_backward(deviations, seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    deviations, seed = ctx.saved_tensors
    return noise_product(grad, deviations, seed, ctx.columns, not ctx.transposed), None, None, None, None


noise_product.register_autograd(_gradient, setup_context=_save)
