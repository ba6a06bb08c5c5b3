"""Memory that one process of several takes to train, by method, whole or sharded. Linux, CPU.

python -m recipes.benchmarks.memory --help
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typing_extensions import override

from recipes.benchmarks.methods import METHODS, OURS
from recipes.benchmarks.workloads import WORKLOADS, Learner
from recipes.ranks import gathered, rank
from recipes.sharding import FSDP2, BlocksAndFactors, shard


class ShardedLearner(Learner):
    """Shards its network under FSDP2."""

    @override
    def configure_model(self) -> None:
        """Cut the network into blocks, once."""
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1 on CPU processes, which Lightning's own class refuses; for measurements only."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), mixed_precision=self.mixed_precision_config, **self.kwargs
        )


# "fsdp1-blocks" is what BlocksAndFactors is against: units of frozen and trained weights together.
STRATEGIES: dict[str, Any] = {
    "one": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2,
    "fsdp1": lambda: FSDP1OnCPU(auto_wrap_policy=BlocksAndFactors()),
    "fsdp1-blocks": lambda: FSDP1OnCPU(auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer, BertLayer})),
}


class Watch(L.Callback):
    """Resident memory of this process after the first step, and its peak in those that follow, in bytes."""

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:  # AdamW has its state, and the perturbation is there
            self.held = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # from here on the kernel looks for the peak anew

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.peak = resident("VmHWM")


def resident(field: str) -> int:
    """What the kernel says of this process's memory, "VmRSS" now or "VmHWM" at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(model: str, strategy: str, method: str, processes: int, steps: int) -> dict[str, float]:
    """Train in this process, one of several.

    Args:
        model: a name of WORKLOADS.
        strategy: a name of STRATEGIES.
        method: a name of METHODS.
        processes: how many take part.
        steps: steps that are watched, after one of warm-up.

    Returns:
        The largest values of all processes, in MiB above what each held before it built the model: between steps, and
        at the peak.
    """
    before = resident("VmRSS")
    how, watch = METHODS[method], Watch()
    sizes = replace(WORKLOADS[model], full=how.full)
    trainer = L.Trainer(
        max_epochs=1,  # not max_steps, which does not count the steps of a peer's own optimizer
        accelerator="cpu",
        devices=processes,
        strategy=STRATEGIES[strategy](),
        callbacks=[watch, *how.callbacks()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [sizes.example() for _ in range((steps + 1) * processes)]
    learner = ShardedLearner if processes > 1 else how.learner
    module = learner(sizes.network(), sizes.causal)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    held, peak = (max(gathered(bytes_ - before)) / 2**20 for bytes_ in (watch.held, watch.peak))
    return {"held_mib": held, "peak_mib": peak}


def start(options: argparse.Namespace, strategy: str, processes: int, method: str) -> dict[str, Any]:
    """Measure in fresh processes, so that nothing of an earlier run is counted."""
    part = options.output.with_suffix(".part")
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    run += ["--rdzv_endpoint=localhost:0", "-m", "recipes.benchmarks.memory", "--worker", "--output", str(part)]
    run += ["--model", options.model, "--steps", str(options.steps)]
    run += ["--strategies", strategy, "--processes", str(processes), "--methods", method]
    # What is freed goes back to the kernel at once, and is not counted.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    part.unlink(missing_ok=True)
    done = subprocess.run(run, env=os.environ | settings, capture_output=True, text=True)
    if not part.exists():  # PyTorch now and then aborts a process as it exits, with plain LoRA too
        raise RuntimeError(f"{strategy}, {processes} processes, {method}:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(part.read_text())
    part.unlink()
    return {"strategy": strategy, "processes": processes, "method": method} | measured


def work(options: argparse.Namespace) -> None:
    """What each of the processes does."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measured = measure(options.model, options.strategies[0], options.methods[0], options.processes[0], options.steps)
    if rank() == 0:
        options.output.write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.barrier()  # no process ends before the figures are written


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON, and return what was written."""
    options = _parser().parse_args(arguments)
    if "all" in options.methods:
        options.methods = list(METHODS)
    if options.worker:
        work(options)
        return {}
    if platform.system() != "Linux":
        raise SystemExit("this benchmark reads /proc, which only Linux has")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    runs = [
        (strategy, processes, method)
        for processes in options.processes
        for strategy in (options.strategies if processes > 1 else ["one"])
        for method in options.methods
    ]
    result = _begun(options)
    rows: list[dict[str, Any]] = result["rows"]
    measured = {(row["strategy"], row["processes"], row["method"]) for row in rows}
    for each in track([each for each in runs if each not in measured], description="memory"):
        rows.append(start(options, *each))
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("strategy", "processes", "method", "between steps (MiB)", "peak (MiB)", title="each process")
    for row in rows:
        figures = f"{row['held_mib']:.0f}", f"{row['peak_mib']:.0f}"
        table.add_row(row["strategy"], str(row["processes"]), row["method"], *figures)
    Console().print(table)
    print(f"written to {options.output}")
    return result


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """What an interrupted run of the same settings has left, or the start of a new result."""
    settings = {"torch": torch.__version__, "model": options.model, "steps": options.steps}
    if options.output.exists():
        left: dict[str, Any] = json.loads(options.output.read_text())
        if {name: value for name, value in left.items() if name != "rows"} == settings:
            return left
    return {**settings, "rows": []}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks.memory",
        description="Resident memory of one process of several in a step of each method, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = [name for name in STRATEGIES if name != "one"]
    parser.add_argument("--model", choices=list(WORKLOADS), default="smollm2")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=several, help="of 2 and more")
    parser.add_argument("--methods", nargs="+", choices=["all", *METHODS], default=list(OURS))
    parser.add_argument("--steps", type=int, default=3, help="watched steps, after one of warm-up")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/memory.json"), help="goes on with what it holds"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
