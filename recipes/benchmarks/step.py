"""What a step costs: LoRA, EFMLoRA and FMLoRA in turns in one run, and the engine against the dense computation.

python -m recipes.benchmarks.step --help
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lightning_flatlora import EFMLoRA, FMLoRA, LoRAPair, Perturbation
from lightning_flatlora.functional import ascent_average, perturbation_scale

RHO = 0.5
METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "LoRA": list,
    "EFMLoRA": lambda: [EFMLoRA(RHO)],
    "FMLoRA": lambda: [FMLoRA(RHO)],
}


@dataclass(frozen=True)
class Workload:
    """A model that trains on random tokens; its weights are random too, since cost does not depend on values.

    Attributes:
        config: a transformers configuration, of a causal LM (Llama) or an encoder (BERT).
        targets: the layers that get LoRA r=8.
        batch: sequences in a step.
        length: tokens in a sequence.
    """

    config: LlamaConfig | BertConfig
    targets: tuple[str, ...]
    batch: int
    length: int

    def module(self) -> "Learner":
        """The model with its adapters, ready to train."""
        torch.manual_seed(0)
        causal = isinstance(self.config, LlamaConfig)
        network = LlamaForCausalLM(self.config) if causal else BertModel(self.config, add_pooling_layer=False)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(self.targets))
        return Learner(get_peft_model(network, config), causal)


WORKLOADS = {
    "minilm": Workload(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        ("query", "value"),
        batch=16,
        length=40,
    ),
    "smollm2": Workload(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        ("q_proj", "v_proj"),
        batch=4,
        length=25,
    ),
    "tiny": Workload(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        ("query", "value"),
        batch=4,
        length=8,
    ),
}


class Learner(L.LightningModule):
    """Trains the adapters of a network with AdamW."""

    def __init__(self, network: nn.Module, causal: bool) -> None:
        super().__init__()
        self.network = network.train()
        self.causal = causal

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The language model's loss, or the mean square of an encoder's states."""
        if self.causal:
            loss: Tensor = self.network(input_ids=batch, labels=batch).loss
        else:
            loss = self.network(input_ids=batch).last_hidden_state.square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Clock(L.Callback):
    """Seconds from one batch's start to the next one's: the whole step, hooks and loop included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the time when the device is idle."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def measure_steps(work: Workload, rounds: int, steps: int, accelerator: str, precision: str) -> dict[str, Any]:
    """Step time of each method, in turns: a noisy machine disturbs all alike.

    Args:
        work: model and sizes.
        rounds: turns of each method.
        steps: measured steps in a turn, after two of warm-up.
        accelerator: Lightning's name, "cpu" or "cuda".
        precision: Lightning's name, as "32-true" or "bf16-mixed".

    Returns:
        For each method: median step in seconds, median over rounds of its ratio to LoRA's turn of the same round, and
        on CUDA the peak memory in MiB.
    """
    batches = [torch.randint(5, 1000, (work.batch, work.length)) for _ in range(steps + 3)]
    modules = {name: work.module() for name in METHODS}
    turns: dict[str, list[float]] = {name: [] for name in METHODS}
    peaks: dict[str, float] = {}
    for number in track(range(rounds), description="steps"):
        order = list(METHODS) if number % 2 == 0 else list(reversed(METHODS))
        for name in order:
            clock = Clock()
            trainer = L.Trainer(
                max_epochs=1,
                accelerator=accelerator,
                devices=1,
                precision=precision,  # type: ignore[arg-type]
                callbacks=[clock, *METHODS[name]()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            if accelerator == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.fit(modules[name], DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
            turns[name].append(statistics.median(clock.seconds[2:]))
            if accelerator == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    return {
        name: {
            "median_seconds": statistics.median(own),
            "ratio_to_lora": statistics.median(a / b for a, b in zip(own, turns["LoRA"], strict=True)),
            **({"peak_mib": peaks[name]} if peaks else {}),
        }
        for name, own in turns.items()
    }


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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print two tables, write JSON, and return what was written."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    device = "cuda" if options.accelerator == "cuda" else "cpu"
    layers, n, m, rank = options.layers
    steps = {
        name: measure_steps(WORKLOADS[name], options.rounds, options.steps, options.accelerator, options.precision)
        for name in options.models
    }
    # The engine after the steps: training has brought the C allocator into the state in which the engine runs.
    engine = measure_engine(layers, n, m, rank, options.repeats, device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "precision": options.precision,
        "engine": {"layers": layers, "n": n, "m": m, "rank": rank} | engine,
        "steps": steps,
    }
    _print(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")
    return result


def _print(result: dict[str, Any]) -> None:
    console = Console()
    engine = result["engine"]
    shape = f"{engine['layers']} layers of {engine['n']} x {engine['m']}, rank {engine['rank']}"
    console.print(f"E for {shape}:")
    for name, label in (("closed", "closed form"), ("engine", "whole engine"), ("dense", "dense, layer by layer")):
        if f"{name}_seconds" in engine:
            ratio = engine.get(f"dense_over_{name}")
            times = f" (dense takes {ratio:.0f} times as long)" if ratio else ""
            console.print(f"  {label}: {engine[f'{name}_seconds'] * 1e3:.2f} ms{times}")
    table = Table("model", "method", "step (ms)", "x LoRA", "peak (MiB)", title=f"{result['device']}, medians")
    for model, methods in result["steps"].items():
        for method, row in methods.items():
            peak = f"{row['peak_mib']:.1f}" if "peak_mib" in row else "-"
            table.add_row(model, method, f"{row['median_seconds'] * 1e3:.1f}", f"{row['ratio_to_lora']:.3f}", peak)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks.step",
        description="Step time of LoRA, EFMLoRA and FMLoRA in turns, and the engine against the dense computation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["minilm", "smollm2"])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each method")
    parser.add_argument("--steps", type=int, default=8, help="measured steps in a turn")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of the engine")
    parser.add_argument(
        "--layers", nargs=4, type=int, metavar=("L", "N", "M", "R"), default=[96, 768, 1024, 8], help="engine's shapes"
    )
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's precision")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/step.json"))
    return parser


if __name__ == "__main__":
    main()
