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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typing_extensions import override

from recipes.benchmarks.methods import METHODS
from recipes.benchmarks.workloads import WORKLOADS, Learner
from recipes.shared.ledger import Ledger, Row, entries
from recipes.shared.memory import Watch, resident
from recipes.shared.methods import OURS
from recipes.shared.ranks import gathered, rank
from recipes.shared.sharding import FSDP2, BlocksAndFactors, shard
from recipes.shared.training import BARE


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
        enable_progress_bar=False,
        **BARE,
    )
    batches = [sizes.example() for _ in range((steps + 1) * processes)]
    learner = ShardedLearner if processes > 1 else how.learner
    module = learner(sizes.network(), sizes.causal)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    held, peak = (max(gathered(bytes_ - before)) / 2**20 for bytes_ in (watch.held, watch.peak))
    return {"held_mib": held, "peak_mib": peak}


class Run(NamedTuple):
    """One measurement, in fresh processes, so that nothing of an earlier one is counted.

    Attributes:
        torch: version of PyTorch.
        model: a name of WORKLOADS.
        steps: steps that are watched.
        strategy: a name of STRATEGIES.
        processes: how many take part.
        method: a name of METHODS.
    """

    torch: str
    model: str
    steps: int
    strategy: str
    processes: int
    method: str

    def __str__(self) -> str:
        return f"{self.model}, {self.strategy}, {self.processes} processes, {self.method}"

    def key(self) -> Row:
        """The first entries of its row."""
        return self._asdict()


def perform(run: Run, output: Path) -> Row:
    """Start the processes, and read what they have written beside the output."""
    part = output.with_suffix(".part")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={run.processes}"]
    # Port 0 is any that is free, so that two benchmarks can run at a time.
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += ["-m", "recipes.benchmarks.memory", "--worker", "--output", str(part)]
    command += ["--model", run.model, "--steps", str(run.steps)]
    command += ["--strategies", run.strategy, "--processes", str(run.processes), "--methods", run.method]
    # What is freed goes back to the kernel at once, and is not counted.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    part.unlink(missing_ok=True)
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if not part.exists():  # PyTorch now and then aborts a process as it exits, with plain LoRA too
        raise RuntimeError(f"{run}:\n{done.stderr[-3000:]}")
    measured: Row = json.loads(part.read_text())
    part.unlink()
    return run.key() | measured


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
    ledger = Ledger(options.output.with_suffix(".rows.jsonl"), entries(*Run._fields))
    for _ in ledger.complete(_runs(options), partial(perform, output=options.output)):
        result = _result(ledger, options)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    rows = result["rows"]
    table = Table("strategy", "processes", "method", "between steps (MiB)", "peak (MiB)", title="each process")
    for row in rows:
        figures = f"{row['held_mib']:.0f}", f"{row['peak_mib']:.0f}"
        table.add_row(row["strategy"], str(row["processes"]), row["method"], *figures)
    Console().print(table)
    print(f"written to {options.output}")
    return result


def _runs(options: argparse.Namespace) -> list[Run]:
    runs = []
    for processes in options.processes:
        for strategy in options.strategies if processes > 1 else ["one"]:
            for method in options.methods:
                runs.append(Run(torch.__version__, options.model, options.steps, strategy, processes, method))
    return runs


def _result(ledger: Ledger, options: argparse.Namespace) -> dict[str, Any]:
    """All that has been measured with these settings, now and earlier."""
    settings = {"torch": torch.__version__, "model": options.model, "steps": options.steps}
    rows = []
    for row in ledger.rows:
        if settings.items() <= row.items():
            rows.append({name: value for name, value in row.items() if name not in settings})
    return {**settings, "rows": rows}


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
        "--output",
        type=Path,
        default=Path("runs/benchmarks/memory.json"),
        help="a .jsonl beside it keeps each measurement",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
