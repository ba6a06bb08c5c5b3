"""What E costs by itself: by the closed form, by the whole engine, and by the paper's equations as they stand."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_flatlora import LoRAPair, Perturbation
from lightning_flatlora.functional import ascent_average, perturbation_scale

RHO = 0.5


def measure_engine(layers: int, n: int, m: int, rank: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of E for all layers: by the closed form, by the whole engine, and by the paper's equations as they stand.

    The closed form starts from stacked tensors and ends with E, as the dense computation does; the engine also gathers
    parameters and gradients, checks that they are finite, and averages.

    Args:
        layers: number of LoRA layers.
        n: rows of each weight.
        m: columns of each weight.
        rank: r.
        repeats: measurements of each; the dense one is left out on CUDA, where it would wait for the host.
        device: "cpu" or "cuda".

    Returns:
        Median seconds, and their ratio.
    """
    generator = torch.Generator().manual_seed(0)
    A, B, grad_A, grad_B = (
        [torch.randn(*shape, generator=generator).to(device) for _ in range(layers)]
        for shape in ((rank, m), (n, rank), (rank, m), (n, rank))
    )
    pairs = [LoRAPair(str(i), nn.Parameter(A[i]), nn.Parameter(B[i]), scaling=2.0) for i in range(layers)]
    for pair, of_A, of_B in zip(pairs, grad_A, grad_B, strict=True):
        pair.A.grad, pair.B.grad = of_A, of_B
    perturbation = Perturbation(pairs)

    all_A, all_B, all_grad_A, all_grad_B = (torch.stack(tensors) for tensors in (A, B, grad_A, grad_B))
    scaling = torch.full((layers,), 2.0, device=device)

    def closed() -> Tensor:
        ascent = ascent_average(all_A, all_B, all_grad_A, all_grad_B, scaling)
        return ascent.direction.mul_(perturbation_scale(ascent.squared_norm.sum(), RHO))

    def engine() -> None:
        perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.9)

    def dense() -> list[Tensor]:
        pinv, s = torch.linalg.pinv, 2.0
        G = [(grad_B[i] @ pinv(A[i].T) / s + pinv(B[i].T) @ grad_A[i] / s) / 2 for i in range(layers)]
        norm = torch.stack([g.norm() for g in G]).norm()
        return [(RHO * G[i] / norm) @ pinv(A[i]) / s for i in range(layers)]

    if device == "cuda":
        return {"closed_seconds": _median_cuda(closed, repeats), "engine_seconds": _median_cuda(engine, repeats)}
    times: dict[str, list[float]] = {"closed": [], "engine": [], "dense": []}
    for _ in track(range(repeats), description="engine"):
        # Ten of the quick ones to one of the slow, so that most find the allocator as they left it, as in training.
        for name, compute in [("closed", closed)] * 10 + [("engine", engine)] * 10 + [("dense", dense)]:
            start = time.perf_counter()
            compute()
            times[name].append(time.perf_counter() - start)
    seconds = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return seconds | {
        "dense_over_closed": seconds["dense_seconds"] / seconds["closed_seconds"],
        "dense_over_engine": seconds["dense_seconds"] / seconds["engine_seconds"],
    }


def _median_cuda(compute: Callable[[], object], repeats: int) -> float:
    """Median device time; any wait of the host for the device inside is an error."""
    compute()
    times = []
    for _ in range(repeats):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        start.record()
        compute()
        end.record()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)
