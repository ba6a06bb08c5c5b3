"""The baselines written a second time: dense, in float64, one pair at a time, with weights that are moved and restored.

Literal loops in plain PyTorch on the network, data and optimizer of float64_runs.py. All they take from the package is
the list of pairs and, for the noise, how a seed is derived.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from float64_runs import SIZE, dataset, loss, network, optimizer_of, scheduler_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_flatlora import LoRAPair, find_pairs
from lightning_flatlora.full_weight.weight_noise import derived_seed

Size = Callable[[int], float]


def plain_network() -> nn.Module:
    """The network of float64_runs.py without an adapter; all of its weights are trained."""
    torch.manual_seed(1)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


class Dense:
    """A training loop; subclasses define how a batch's gradient is computed and what happens before the update."""

    def __init__(self, size: Size, model: nn.Module | None = None) -> None:
        self.size = size
        self.model = network() if model is None else model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step = 0

    def run(self, epochs: int, accumulate: int = 1) -> nn.Module:
        self.accumulate = accumulate
        optimizer = optimizer_of(self.model)
        scheduler = scheduler_of(optimizer)
        batches = list(DataLoader(dataset(), batch_size=SIZE))
        for _ in range(epochs):
            for start in range(0, len(batches), accumulate):
                window = [self.gradient(batch) for batch in batches[start : start + accumulate]]
                for p, *grads in zip(self.trained, *window, strict=True):
                    p.grad = sum(grads[1:], grads[0]) / accumulate
                self.before_update(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
                self.step += 1
        return self.model

    def gradient(self, batch: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(self.model, batch), self.trained)

    def before_update(self, lr: float) -> None:
        pass

    @property
    def pairs(self) -> list[LoRAPair]:
        return find_pairs(self.model).pairs


class DenseSAM(Dense):
    """e = rho g / ||g|| on the parameters that are moved; the norm is taken over these only."""

    def moved(self) -> list[nn.Parameter]:
        return self.trained

    def gradient(self, batch: Any) -> tuple[Tensor, ...]:
        moved, clean = self.moved(), [p.data.clone() for p in self.moved()]
        g = torch.autograd.grad(loss(self.model, batch), moved)
        norm = sum(float((part**2).sum()) for part in g) ** 0.5
        for p, part in zip(moved, g, strict=True):
            p.data = p.data + self.size(self.step) * part / norm
        descent = super().gradient(batch)
        for p, value in zip(moved, clean, strict=True):
            p.data = value
        return descent


class DenseLoRASAM(DenseSAM):
    """The same, but only on A and B."""

    def moved(self) -> list[nn.Parameter]:
        factors = []
        for pair in self.pairs:
            factors += [pair.A, pair.B]
        return factors


class DenseBAR(Dense):
    """Algorithms 2 and 3 of arXiv 2410.14802, x = B and y = A."""

    kind = "nBAR"

    def before_update(self, lr: float) -> None:
        step = self.size(self.step) * lr
        for pair in self.pairs:
            x, y = pair.B, pair.A
            if self.kind == "nBAR":
                grows = float((x.grad**2).sum()) >= float((y.grad**2).sum())
            else:
                grows = not float((x.data**2).sum()) >= float((y.data**2).sum())
            x.data = (1 + step if grows else 1 - step) * x.data
            y.data = (1 - step if grows else 1 + step) * y.data


class DenseOBAR(DenseBAR):
    """Algorithm 3."""

    kind = "oBAR"


class DenseFlatLoRA(Dense):
    """Eq. 7 of arXiv 2409.14396 on the merged weight, with noise that is added to the stored base."""

    seed = 5

    def gradient(self, batch: Any) -> tuple[Tensor, ...]:
        layers = [self.model.base_model.model[i] for i in (0, 2, 4)]
        clean = [layer.base_layer.weight.data for layer in layers]
        for index, layer in enumerate(layers):
            base = layer.base_layer.weight
            B, A = layer.lora_B.default.weight, layer.lora_A.default.weight
            merged = (base + layer.scaling["default"] * B @ A).detach()
            base.data = base.data + dense_noise(merged, self.size(self.step), derived_seed(self.seed, self.step), index)
        descent = super().gradient(batch)
        for layer, value in zip(layers, clean, strict=True):
            layer.base_layer.weight.data = value
        return descent


def dense_noise(merged: Tensor, sigma: float, seed: int, index: int) -> Tensor:
    """Each entry is sigma / sqrt(m) ||W'_i|| times a standard normal number."""
    generator = torch.Generator().manual_seed(derived_seed(seed, index))
    normal = torch.randn(merged.shape, generator=generator, dtype=merged.dtype)
    rows = merged.square().sum(1, keepdim=True).sqrt()
    return sigma / merged.shape[1] ** 0.5 * rows * normal


class DenseBiLoRA(Dense):
    """arXiv 2508.19564 on explicitly formed weights W0 + s B A + B2 A2, in a forward pass written out."""

    seed = 5

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.auxiliary: dict[int, tuple[Tensor, Tensor]] = {}
        for index in (0, 2, 4):
            n, m = self.layer(index).base_layer.weight.shape
            seed = derived_seed(self.seed, zlib.crc32(f"net.base_model.model.{index}".encode()))
            A = torch.empty(4, m, dtype=torch.float64)
            A.uniform_(-(m**-0.5), m**-0.5, generator=torch.Generator().manual_seed(seed))
            self.auxiliary[index] = (A.requires_grad_(), torch.zeros(n, 4, dtype=torch.float64, requires_grad=True))
        self.uphill: list[tuple[Tensor, ...]] = []
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.ascents = 0
        self.norms: list[float] = []

    def layer(self, index: int) -> Any:
        return self.model.base_model.model[index]

    def gradient(self, batch: Any) -> tuple[Tensor, ...]:
        if self.size(self.step) == 0:
            return super().gradient(batch)
        x, factors = batch[0], []
        for index, (A2, B2) in self.auxiliary.items():
            layer = self.layer(index)
            A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
            W = layer.base_layer.weight + layer.scaling["default"] * B @ A + B2 @ A2
            x = torch.tanh(x @ W.T + layer.base_layer.bias)
            factors += [A2, B2]
        grads = torch.autograd.grad(F.cross_entropy(self.layer(6)(x), batch[1]), [*self.trained, *factors])
        self.uphill.append(grads[len(self.trained) :])
        return grads[: len(self.trained)]

    def before_update(self, lr: float) -> None:
        if not self.uphill:
            return
        factors: list[Tensor] = []
        for pair in self.auxiliary.values():
            factors += pair
        means = [sum(grads[1:], grads[0]) / self.accumulate for grads in zip(*self.uphill, strict=True)]
        self.uphill = []
        self.ascents += 1
        for index, (factor, grad) in enumerate(zip(factors, means, strict=True)):
            first, second = self.moments.get(index, (torch.zeros_like(grad), torch.zeros_like(grad)))
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            self.moments[index] = first, second
            size = (second / (1 - 0.999**self.ascents)).sqrt() + 1e-8
            factor.data = factor.data + lr * first / (1 - 0.9**self.ascents) / size
        norm = frobenius([B2 @ A2 for A2, B2 in self.auxiliary.values()])
        rho = self.size(self.step)
        for factor in factors:
            factor.data = factor.data * min(1.0, rho / norm) ** 0.5
        self.norms.append(norm)


def frobenius(tensors: list[Tensor]) -> float:
    """The norm over all entries of several tensors."""
    return sum(float((tensor.detach() ** 2).sum()) for tensor in tensors) ** 0.5
