"""Gaussian noise on the full weight of every adapted layer, drawn when needed and never stored."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.full_weight.output_terms import OutputTerm, output_terms
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.schedules import is_integer, is_size
from lightning_flatlora.sharding import is_sharded


class WeightNoise:
    r"""Filter-wise Gaussian noise on W' = W0 + s B A of every adapted Linear layer (Flat-LoRA, Eq. 7).

    .. math:: \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right),
        \qquad y = W' x + \varepsilon x

    so that :math:`\lVert\varepsilon\rVert_F` is about sigma times :math:`\lVert W'\rVert_F`. While the noise is on,
    each layer's base adds :math:`\varepsilon x` to its output. The n x m noise exists only inside a layer's forward and
    again inside its backward. Each layer's noise is drawn from a separate generator with its own seed, so the graph
    keeps only a seed and n numbers, and ranks on devices of one kind draw identical noise. W' is never formed: its row
    norms need only those of W0 and pieces of size r. The cost is two draws and two more products per layer.

    If a backward computes layers again (activation checkpointing), it must run while the noise is on. Layers whose
    adapter is disabled get no noise.

    Attributes:
        names: clean names of the layers that get noise, in the model's order.
        left_out: one line for each kind of adapted layer without noise, with the reason.

    Args:
        model: a module that contains peft LoRA layers at any depth, not sharded.
        adapter_name: the adapter that enters W'; None takes each layer's active ones.
        finder: finds the pairs, and their bases, of layers that are not peft's.

    Raises:
        NoPairsError: no LoRA layer on a Linear is trained; the message lists the layers seen.
        ValueError: a sharded model, or no adapter of that name.

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
            raise ValueError("noise on a whole weight needs all of it, but FSDP leaves each rank a part: use DDP")
        self._layers, self.left_out = output_terms(NoisyLayer, model, adapter_name, finder)
        self.names = list(chain.from_iterable(layer.names for layer in self._layers))

    @contextmanager
    def applied(self, sigma: float, seed: int) -> Iterator[None]:
        """Let the layers compute with W' + noise inside; the row norms are those of the current weights.

        Args:
            sigma: size of the noise relative to each row's norm, without a unit, >= 0; 0 changes nothing, bit for bit.
            seed: >= 0; seed and weights determine the noise.
        """
        if not is_size(sigma):
            raise ValueError(f"sigma must be a finite number >= 0, got {sigma!r}")
        if not is_integer(seed, least=0):
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        with ExitStack() as stack:
            if sigma > 0:
                draw_noise(self._layers, sigma, seed)
                for layer in self._layers:
                    layer.on()
                    stack.callback(layer.off)
            yield


class NoisyLayer(OutputTerm):
    """The noise of one Linear, a function of a seed and the row norms of its weight."""

    def draw(self, sigma: float, seed: int) -> None:
        """Set the noise, scaled by the current weights."""
        self._deviations = sigma * (self._squared_norms() / self.weight.shape[1]).sqrt()
        # A tensor, since torch.compile would make a plain number a constant and compile again for every seed.
        self._seed = torch.tensor(np.array(seed, np.uint64).astype(np.int64))

    @override
    def term(self, x: Tensor) -> Tensor:
        noisy: Tensor = noise_product(x, self._deviations, self._seed, x.shape[-1])
        return noisy

    @cached_property
    def _base_squared(self) -> Tensor:
        """Compute ||W0_i||^2 of every row i, only once, since this reads the whole base, which is frozen."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(self.weight, dim=1, dtype=wide)
        return norms.square()

    @torch.no_grad()
    def _squared_norms(self) -> Tensor:
        """Compute ||W0_i||^2 + 2 B_i (W0 A^T)_i + B_i A A^T B_i^T of every row i, with s in B, shape (n,)."""
        W0 = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        # Under autocast the products, and with them small norms, would be rounded to 16 bits.
        with torch.autocast(W0.device.type, enabled=False):
            A, B = (factor.to(W0.dtype) for factor in self.factors())
            cross = (B * (W0 @ A.mT)).sum(1)
            squared = self._base_squared.to(W0.device) + 2 * cross + ((B @ (A @ A.mT)) * B).sum(1)
        return squared.clamp_min(0)


def draw_noise(layers: Iterable[NoisyLayer], sigma: float, seed: int) -> None:
    """Set the noise of several layers, each from its own seed."""
    for index, layer in enumerate(layers):
        layer.draw(sigma, derived_seed(seed, index))


@torch.library.custom_op("lightning_flatlora::noise_product", mutates_args=())
def noise_product(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool = False) -> Tensor:
    """Multiply x (..., m) by the transposed noise, or x (..., n) by the noise, whose rows have given deviations.

    One operator that is opaque to compilers, since it draws from a generator.
    """
    # The tensor is signed, but a seed is not.
    generator = torch.Generator(deviations.device).manual_seed(int(seed) % 2**64)
    shape = (len(deviations), columns)
    normal = torch.randn(shape, generator=generator, dtype=deviations.dtype, device=deviations.device)
    noise = normal.mul_(deviations[:, None]).to(x.dtype)
    return x @ (noise if transposed else noise.mT)


@noise_product.register_fake
def _(x: Tensor, deviations: Tensor, seed: Tensor, columns: int, transposed: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns if transposed else deviations.shape[0])


# The noise is not saved for the backward, which draws it again from the seed.
def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, deviations, seed, ctx.columns, ctx.transposed = inputs
    ctx.save_for_backward(deviations, seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    deviations, seed = ctx.saved_tensors
    return noise_product(grad, deviations, seed, ctx.columns, not ctx.transposed), None, None, None, None


noise_product.register_autograd(_gradient, setup_context=_save)


def derived_seed(seed: int, index: int) -> int:
    """Derive a 64-bit seed from two numbers; neighbouring pairs get unrelated seeds.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
        (True, False)
    """
    # A sum of the two numbers would give neighbouring steps and layers equal seeds.
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
