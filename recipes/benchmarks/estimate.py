"""What a step would take on GPUs that nobody has measured it on, from counted kernels, bytes and operations.

python -m recipes.benchmarks.estimate                 # RoBERTa-large, and a 7B Llama at ranks 8, 64 and 256

Nothing is computed: the very code of a step runs on tensors without values, and every kernel that it would launch is
noted. A kernel then takes the longest of what its launch, its bytes and its operations take at the card's best.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.perturbation.pair_stack import fresh_perturbation
from recipes.benchmarks.methods import RHO
from recipes.benchmarks.workloads import WORKLOADS, Learner, Workload

LAUNCH = 5e-6
"""Seconds between two kernels of a host that launches them one by one."""

COLUMN = 1e-6
"""Seconds of one column of a batched Cholesky factorization or triangular solve, whose columns wait for each other."""

# What these do takes no kernel.
_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


@dataclass(frozen=True)
class Card:
    """What a GPU's data sheet says.

    Attributes:
        speed: operations a second (a multiplication and an addition are two), by dtype.
        bandwidth: bytes a second.
    """

    speed: dict[torch.dtype, float]
    bandwidth: float


CARDS = {
    "H100 SXM": Card({torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12}, 3.35e12),
    "RTX 4090": Card({torch.bfloat16: 165e12, torch.float32: 82.6e12, torch.float64: 82.6e12 / 64}, 1.01e12),
}
"""Dense, without TF32, which would lose digits; the H100's float64 is that of its tensor cores."""


@dataclass(frozen=True)
class Kernel:
    """What one call launches.

    Attributes:
        bytes: read and written.
        operations: multiplications and additions of products, factorizations and solves; 0 for the rest.
        dtype: in which they are done.
        columns: that have to wait for each other.
    """

    bytes: int
    operations: float
    dtype: torch.dtype
    columns: int

    def seconds(self, card: Card) -> float:
        """The longest of its launch, its bytes, its operations and its waiting columns."""
        speed = card.speed.get(self.dtype, card.speed[torch.float32])
        return max(LAUNCH, self.bytes / card.bandwidth, self.operations / speed, self.columns * COLUMN)


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is launched inside: every operation that is not a view of what is there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _ALLOCATES:
            self.seen.append(_kernel(name, func, args, kwargs, out))
        return out

    def total(self) -> dict[str, float]:
        """Number of kernels, their bytes, and their operations by dtype."""
        operations: Counter[str] = Counter()
        for kernel in self.seen:
            operations[str(kernel.dtype).removeprefix("torch.")] += int(kernel.operations)
        moved = sum(kernel.bytes for kernel in self.seen)
        return {"kernels": len(self.seen), "bytes": moved, **{f"{k}_operations": v for k, v in operations.items() if v}}

    def seconds(self, card: Card) -> float:
        """One kernel after the other."""
        return sum(kernel.seconds(card) for kernel in self.seen)


def _kernel(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> Kernel:
    tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    operations, columns = 0.0, 0
    product = getattr(torch.ops.aten, name.removesuffix("_"), None)  # what is done in place has the same formula
    if name in ("linalg_cholesky_ex", "linalg_solve_triangular"):
        matrix = args[0]
        columns = matrix.shape[-1]
        # For n rows n^3 / 3 operations of the factorization, and n^3 where the solve is of n right-hand sides.
        operations = matrix.numel() * columns / (3 if name == "linalg_cholesky_ex" else 1)
    elif product in flop_registry:
        operations = flop_registry[product](*args, **kwargs, out_val=out)
    dtype = tensors[0].dtype if tensors else torch.float32
    return Kernel(moved, operations, dtype, columns)


def count_step(work: Workload) -> Kernels:
    """The kernels of LoRA's step: forward, backward and AdamW, all in bf16, the frozen weights without gradients."""
    learner = Learner(_network(work).to(torch.bfloat16), work.causal)
    # foreach is AdamW's default on a GPU, but not on the meta device.
    optimizer = torch.optim.AdamW(learner.trained(), lr=1e-4, foreach=True)
    batch = torch.zeros(work.batch, work.length, dtype=torch.long, device="meta")
    kernels = Kernels()
    with kernels:
        learner.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return kernels


def count_engine(work: Workload) -> Kernels:
    """The kernels that EFMLoRA adds to it: a refresh, the average, and B + E in each layer; factors in float32."""
    pairs = find_pairs(_network(work)).pairs
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    perturbation = Perturbation(pairs)
    perturbation.install()
    kernels = Kernels()
    with kernels:
        with torch.no_grad():  # not ascend(): autocast does not know the meta device
            fresh = fresh_perturbation(perturbation._stacks, "global", RHO, True, [])
            perturbation.average(fresh, beta=0.9)
        with perturbation.applied():
            for pair in pairs:
                lora_B: Any = pair.readers[0]
                assert lora_B.weight is not pair.B
    perturbation.uninstall()
    return kernels


def _network(work: Workload) -> nn.Module:
    with torch.device("meta"):
        return work.network()


def works(tokens: int) -> dict[str, Workload]:
    """The models by name, with this number of tokens in a step."""
    roberta = replace(_of("roberta-large"), batch=max(1, tokens // 128), length=min(tokens, 128))
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, intermediate_size=11008)
    llama = replace(_of("llama-7b-layers"), config=config, batch=max(1, tokens // 512), length=min(tokens, 512))
    named = {"RoBERTa-large": roberta}
    for rank in (8, 64, 256):
        named[f"Llama 7B, rank {rank}"] = replace(llama, rank=rank)
    return named


def _of(name: str) -> Workload:
    work = WORKLOADS[name]
    assert isinstance(work, Workload)
    return work


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Count, print a table, write JSON, and return what was written."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096], help="of a step")
    parser.add_argument("--models", nargs="+", default=[], help="names as in the table; all by default")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/estimate.json"))
    options = parser.parse_args(arguments)
    known = list(works(options.tokens[0]))
    unknown = [name for name in options.models if name not in known]
    if unknown:
        parser.error(f"--models: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    if min(options.tokens) < 1:
        parser.error("--tokens must be 1 or more")
    rows = []
    for tokens in options.tokens:
        for name, work in works(tokens).items():
            if not options.models or name in options.models:
                rows.append({"model": name, "tokens": tokens, **estimate(work)})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    _print(rows)
    return rows


def estimate(work: Workload) -> dict[str, Any]:
    """Counts of LoRA's step and of what EFMLoRA adds, and the seconds of both on each card."""
    step, engine = count_step(work), count_engine(work)
    seconds = {}
    for name, card in CARDS.items():
        alone, added = step.seconds(card), engine.seconds(card)
        seconds[name] = {"step": alone, "engine": added, "ratio": 1 + added / alone}
    return {"step": step.total(), "engine": engine.total(), "seconds": seconds}


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "model", "tokens", "engine: kernels", "GB", "float32 GFLOP", "float64", title="Estimates, not measurements"
    )
    for name in CARDS:
        table.add_column(f"{name}: step + engine (ms)")
    for row in rows:
        counts = row["engine"]
        operations = (counts.get(f"{dtype}_operations", 0) / 1e9 for dtype in ("float32", "float64"))
        cells = [str(counts["kernels"]), f"{counts['bytes'] / 1e9:.2f}", *(f"{value:.1f}" for value in operations)]
        for card in row["seconds"].values():
            cells.append(f"{card['step'] * 1e3:.1f} + {card['engine'] * 1e3:.1f} ({card['ratio']:.2f})")
        table.add_row(row["model"], str(row["tokens"]), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
