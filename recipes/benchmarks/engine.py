"""What E costs by itself: by the closed form, by the whole engine, and by the paper's equations as they stand."""

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lightning_flatlora import LoRAPair, Perturbation
from lightning_flatlora.functional import ascent_average, perturbation_scale

RHO = 0.5
_SCALING = 2.0


def measure_engine(layers: int, n: int, m: int, rank: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of E for all layers: by the closed form, by the whole engine, and by the paper's equations as they stand.

    The closed form starts from stacked tensors and ends with E, as the dense computation does; the engine also gathers
    parameters and gradients, checks that they are finite, and averages.

    Args:
        layers: number of LoRA layers.
        n: rows of each weight.
        m: columns of each weight.
        rank: r.
        repeats: calls of each.
        device: "cpu" or "cuda".

    Returns:
        Mean seconds of each.
    """
    work = _Layers(layers, n, m, rank, device)
    seconds = {}
    for name, compute in (("closed", work.closed), ("engine", work.engine), ("dense", work.dense)):
        # Timer waits for the device, and has calls of its own before it measures.
        timer = Timer("compute()", globals={"compute": compute}, num_threads=torch.get_num_threads())
        seconds[f"{name}_seconds"] = timer.timeit(repeats).mean
    return seconds


class _Layers:
    """LoRA layers of one shape with random factors and gradients, and three ways to compute E for all of them."""

    def __init__(self, layers: int, n: int, m: int, rank: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def factors(rows: int, columns: int) -> list[Tensor]:
            return [torch.randn(rows, columns, generator=generator).to(device) for _ in range(layers)]

        self.A, self.B = factors(rank, m), factors(n, rank)
        # Gradients of no loss: the closed form and the dense one need not agree on them, but cost what they always do.
        self.grad_A, self.grad_B = factors(rank, m), factors(n, rank)
        self.stacked_factors = torch.stack(self.A), torch.stack(self.B)
        self.stacked_gradients = torch.stack(self.grad_A), torch.stack(self.grad_B)
        self.scaling = torch.full((layers,), _SCALING, device=device)
        pairs = []
        for i in range(layers):
            pair = LoRAPair(str(i), nn.Parameter(self.A[i]), nn.Parameter(self.B[i]), scaling=_SCALING)
            pair.A.grad, pair.B.grad = self.grad_A[i], self.grad_B[i]
            pairs.append(pair)
        self.perturbation = Perturbation(pairs)

    def closed(self) -> Tensor:
        ascent = ascent_average(*self.stacked_factors, *self.stacked_gradients, self.scaling)
        return ascent.direction.mul_(perturbation_scale(ascent.squared_norm.sum(), RHO))

    def engine(self) -> None:
        self.perturbation.average(self.perturbation.ascend(RHO, at_perturbed=True), beta=0.9)

    def dense(self) -> list[Tensor]:
        pinv, s = torch.linalg.pinv, _SCALING
        gradients = []
        for A, B, grad_A, grad_B in zip(self.A, self.B, self.grad_A, self.grad_B, strict=True):
            gradients.append((grad_B @ pinv(A.T) / s + pinv(B.T) @ grad_A / s) / 2)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return [(RHO * gradient / norm) @ pinv(A) / s for gradient, A in zip(gradients, self.A, strict=True)]
