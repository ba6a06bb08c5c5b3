"""What a step costs, by method, in turns in one run.

python -m recipes.benchmarks.step                                            # LoRA, EFMLoRA, FMLoRA
python -m recipes.benchmarks.step --models roberta-large --methods all       # baselines and peers too
python -m recipes.benchmarks.step --models minilm --vary rank 4 16 64 256    # how it grows; or layers, or batch
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
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pandas import DataFrame
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from recipes.benchmarks.methods import METHODS, Method
from recipes.benchmarks.workloads import WORKLOADS, Stack, Workload
from recipes.shared.methods import OURS
from recipes.shared.options import known_names, parse_options
from recipes.shared.training import BARE

Row = dict[str, Any]

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Options:
    """The settings of one benchmark, as ``--help`` explains them.

    Attributes:
        models: names of workloads.
        methods: to compare with LoRA, or all.
        vary: rank, layers or batch, and the values to try in its place.
        rounds: turns of each method.
        steps: measured steps in a turn.
        accelerator: cpu or cuda.
        precision: Lightning's.
        time: the processor's time leaves out what else the machine does.
        threads: of the CPU.
        output: file of the results; a plot comes beside it.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    methods: list[str] = field(default_factory=lambda: list(OURS))
    vary: list[str] = field(default_factory=list)
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
        what, *values = self.vary or ["", "0"]
        if what not in ("", "rank", "layers", "batch") or not values or not all(value.isdigit() for value in values):
            raise SystemExit(f"--vary takes rank, layers or batch, and the values to try, got {' '.join(self.vary)}")
        self.varied = what
        self.values = [int(value) for value in values]


class Clock(L.Callback):
    """Seconds from one batch's start to the next one's: the whole step, hooks and loop included.

    Args:
        now: the clock that is read.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: list[float] = []
        self._now = now
        self._last: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the time when the device is idle."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = self._now()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def measure_steps(work: Workload | Stack, methods: list[str], options: Options) -> list[Row]:
    """Step time of each method, in turns: a noisy machine disturbs all alike.

    Args:
        work: model and sizes.
        methods: names of METHODS, LoRA among them.
        options: of the command line: rounds, steps, accelerator and precision.

    Returns:
        A row for each method: median step in seconds, its ratio to LoRA's turn of the same round for each round and
        their median, and on CUDA the peak memory in MiB.
    """
    # Two more for the warm-up, and one whose start ends the last step that is measured.
    batches = [work.example() for _ in range(options.steps + 3)]
    kinds = {METHODS[name].full for name in methods}
    networks = {full: replace(work, full=full).network() for full in kinds}
    turns: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, float] = {}
    for number in track(range(options.rounds), description="steps"):
        # There and back, so that a machine that gets slower within a round favours no method.
        for name in methods if number % 2 == 0 else reversed(methods):
            if options.accelerator == "cuda":
                torch.cuda.reset_peak_memory_stats()
            turns[name].append(_turn(METHODS[name], networks[METHODS[name].full], work.causal, batches, options))
            if options.accelerator == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    rows: list[Row] = []
    for name, seconds in turns.items():
        ratios = [a / b for a, b in zip(seconds, turns["LoRA"], strict=True)]
        row = {"method": name, "median_seconds": statistics.median(seconds), "ratio_to_lora": statistics.median(ratios)}
        rows.append({**row, "ratios": ratios, **({"peak_mib": peaks[name]} if peaks else {})})
    return rows


def _turn(method: Method, network: nn.Module, causal: bool, batches: list[Any], options: Options) -> float:
    """Median seconds of a step, after two of warm-up."""
    gc.collect()  # the last turn's trainer and optimizer, whose parts point at each other
    clock = Clock(CLOCKS[options.time])
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,  # type: ignore[arg-type]
        callbacks=[clock, *method.callbacks()],
        enable_progress_bar=False,
        **BARE,
    )
    trainer.fit(method.learner(network, causal), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    network.zero_grad()
    return statistics.median(clock.seconds[2:])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write JSON and a plot, and return what was written."""
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
    for model in options.models:
        for value in options.values:
            changed: dict[str, Any] = {options.varied: value} if options.varied else {}
            work = replace(WORKLOADS[model], **changed)
            sizes = {"model": model, "rank": work.rank, "batch": work.batch, "layers": work.layers}
            rows += [sizes | row for row in measure_steps(work, options.methods, options)]
            _write(result, options.output)  # what is measured so far stays, whatever happens to the rest
    _print(result)
    _write(result, options.output)
    print(f"written to {options.output}")
    plot(rows, options.varied, options.output.with_suffix(".png"))
    return result


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def plot(rows: list[Row], varied: str, path: Path) -> None:
    """Step time relative to LoRA by method and model, or against what was varied."""
    frame, label = DataFrame(rows), "step time relative to LoRA"
    if varied:
        lines = frame.pivot(index=varied, columns=["model", "method"], values="ratio_to_lora")
        axes = lines.plot(marker="o", logx=True, ylabel=label)
    else:
        axes = frame.pivot(index="method", columns="model", values="ratio_to_lora").plot.barh(xlabel=label)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"plotted in {path}")


def _print(result: dict[str, Any]) -> None:
    frame = DataFrame(result["steps"])
    frame["lowest ratio"], frame["highest ratio"] = frame["ratios"].map(min), frame["ratios"].map(max)
    print(f"{result['device']}, medians")
    print(frame.drop(columns="ratios").to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
