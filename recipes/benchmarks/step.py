"""Cost of a training step, by method; the methods alternate within one run.

python -m recipes.benchmarks.step                                            # LoRA, EFMLoRA, FMLoRA
python -m recipes.benchmarks.step --models roberta-large --methods all       # baselines and a peer too
python -m recipes.benchmarks.step --models minilm --ranks 4 16 64 256        # cost by rank
python -m recipes.benchmarks.step --models small-layers --time processor
"""

import gc
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pandas import DataFrame
from rich.progress import track
from torch import nn

from recipes.benchmarks.methods import METHODS, OURS, Method, train
from recipes.benchmarks.workloads import WORKLOADS, Stack, Workload
from recipes.command_line.options import known_names, parse_options

Row = dict[str, Any]

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Options:
    """Settings of this benchmark, shown by ``--help``.

    Attributes:
        models: names of workloads.
        methods: methods to compare with LoRA, or all.
        ranks: ranks of the adapter, instead of the models' own.
        rounds: turns of each method.
        steps: measured steps per turn.
        accelerator: cpu or cuda.
        precision: Lightning's precision.
        time: clock to read; the processor's time leaves out other work of the machine.
        threads: CPU threads.
        output: output file, JSON.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    methods: list[str] = field(default_factory=lambda: list(OURS))
    ranks: list[int] = field(default_factory=list)
    rounds: int = 10
    steps: int = 8
    accelerator: Literal["cpu", "cuda"] = "cpu"
    precision: str = "32-true"
    time: Literal["wall", "processor"] = "wall"
    threads: int = 1
    output: Path = Path("runs/benchmarks/step.json")

    def __post_init__(self) -> None:
        known_names("--models", self.models, WORKLOADS)
        named = METHODS if "all" in self.methods else ["LoRA", *self.methods]
        self.methods = known_names("--methods", list(named), METHODS)


class Clock(L.Callback):
    """Records when each batch starts; a step lasts until the next start, with hooks and loop.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.starts: list[float] = []
        self._now = now

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the time when the device is idle."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.starts.append(self._now())


def measure_steps(work: Workload | Stack, methods: list[str], options: Options) -> list[Row]:
    """Measure each method's step time; the methods alternate, so that a noisy machine disturbs all of them alike.

    Args:
        work: model and sizes.
        methods: names of METHODS, LoRA among them.
        options: rounds, steps, accelerator and precision.

    Returns:
        A row per method: the median step in seconds, and its ratios to LoRA's turns in the same rounds with their
        median.
    """
    # Two more for the warm-up, and one whose start ends the last measured step.
    batches = [work.example() for _ in range(options.steps + 3)]
    kinds = {METHODS[name].full for name in methods}
    networks = {full: replace(work, full=full).network() for full in kinds}
    turns: dict[str, list[float]] = {name: [] for name in methods}
    for number in track(range(options.rounds), description="steps"):
        # Back and forth, so that a machine that slows down within a round favours no method.
        for name in methods if number % 2 == 0 else reversed(methods):
            turns[name].append(_turn(METHODS[name], networks[METHODS[name].full], work.causal, batches, options))
    rows: list[Row] = []
    for name, seconds in turns.items():
        ratios = [a / b for a, b in zip(seconds, turns["LoRA"], strict=True)]
        medians = {"median_seconds": statistics.median(seconds), "ratio_to_lora": statistics.median(ratios)}
        rows.append({"method": name, **medians, "ratios": ratios})
    return rows


def _turn(method: Method, network: nn.Module, causal: bool, batches: list[Any], options: Options) -> float:
    """Return the median seconds per step, after two warm-up steps."""
    gc.collect()  # the last turn's trainer and optimizer, which reference each other
    clock = Clock(CLOCKS[options.time])
    settings = {"accelerator": options.accelerator, "precision": options.precision}
    train(method, network, causal, batches, clock, **settings)
    network.zero_grad()
    return statistics.median(end - start for start, end in list(pairwise(clock.starts))[2:])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON, and return what was written."""
    options = parse_options(Options, arguments, "python -m recipes.benchmarks.step", "Step time by method.")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.accelerator == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "precision": options.precision,
        "time": options.time,
        "steps": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for rank in options.ranks or [WORKLOADS[model].rank]:
            work = replace(WORKLOADS[model], rank=rank)
            sizes = {"model": model, "rank": rank, "batch": work.batch, "layers": work.layers}
            rows += [sizes | row for row in measure_steps(work, options.methods, options)]
            # Results so far are kept, whatever happens to the rest.
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    frame = DataFrame(rows)
    frame["lowest ratio"], frame["highest ratio"] = frame["ratios"].map(min), frame["ratios"].map(max)
    print(f"{result['device']}, medians")
    print(frame.drop(columns="ratios").to_string(index=False, float_format="{:.4g}".format))
    print(f"written to {options.output}")
    return result


if __name__ == "__main__":
    main()
