"""What a step costs, by method, in turns in one run; and the engine against the dense computation.

python -m recipes.benchmarks.step                                            # LoRA, EFMLoRA, FMLoRA
python -m recipes.benchmarks.step --models roberta-large --methods all       # baselines and peers too
python -m recipes.benchmarks.step --models minilm --vary rank 4 16 64 256    # how it grows; or layers, or batch
python -m recipes.benchmarks.step --models small-layers --time processor --repeats 0
"""

import argparse
import gc
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pandas import DataFrame
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from recipes.benchmarks.engine import measure_engine
from recipes.benchmarks.methods import METHODS, Method
from recipes.benchmarks.workloads import WORKLOADS, Stack, Workload
from recipes.shared.methods import OURS
from recipes.shared.training import BARE

Row = dict[str, Any]

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


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


def measure_steps(work: Workload | Stack, methods: list[str], options: argparse.Namespace) -> list[Row]:
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


def _turn(method: Method, network: nn.Module, causal: bool, batches: list[Any], options: argparse.Namespace) -> float:
    """Median seconds of a step, after two of warm-up."""
    gc.collect()  # the last turn's trainer and optimizer, whose parts point at each other
    clock = Clock(CLOCKS[options.time])
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        callbacks=[clock, *method.callbacks()],
        enable_progress_bar=False,
        **BARE,
    )
    trainer.fit(method.learner(network, causal), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    network.zero_grad()
    return statistics.median(clock.seconds[2:])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write JSON and a plot, and return what was written."""
    options = _options(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    device = "cuda" if options.accelerator == "cuda" else "cpu"
    rows: list[Row] = []
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "precision": options.precision,
        "time": options.time,
        "steps": rows,
    }
    for model in options.models:
        for value in options.values:
            work = WORKLOADS[model].varied(options.varied, value) if options.varied else WORKLOADS[model]
            sizes = {"model": model, "rank": work.rank, "batch": work.batch, "layers": work.layers}
            rows += [sizes | row for row in measure_steps(work, options.methods, options)]
            _write(result, options.output)  # what is measured so far stays, whatever happens to the rest
    if not options.varied and options.repeats:
        layers, n, m, rank = options.layers
        shape = {"layers": layers, "n": n, "m": m, "rank": rank}
        result["engine"] = shape | measure_engine(layers, n, m, rank, options.repeats, device)
    _print(result)
    _write(result, options.output)
    print(f"written to {options.output}")
    plot(rows, options.varied, options.output.with_suffix(".png"))
    return result


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def plot(rows: list[Row], varied: str | None, path: Path) -> None:
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
    for name, value in result.get("engine", {}).items():
        print(f"E of all layers, {name}: {value:.4g}")
    frame = DataFrame(result["steps"])
    frame["lowest ratio"], frame["highest ratio"] = frame["ratios"].map(min), frame["ratios"].map(max)
    print(f"{result['device']}, medians")
    print(frame.drop(columns="ratios").to_string(index=False, float_format="{:.4g}".format))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if "all" in options.methods:
        options.methods = list(METHODS)
    if "LoRA" not in options.methods:
        options.methods = ["LoRA", *options.methods]
    options.varied, options.values = None, [0]
    if options.vary:
        what, *values = options.vary
        if what not in ("rank", "layers", "batch") or not values or not all(v.isdigit() and int(v) for v in values):
            parser.error(f"--vary takes rank, layers or batch, and the values to try, got {' '.join(options.vary)}")
        options.varied, options.values = what, [int(value) for value in values]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks.step",
        description="Step time by method, in turns, and the engine against the dense computation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["minilm", "smollm2"])
    parser.add_argument("--methods", nargs="+", choices=["all", *METHODS], default=list(OURS), help="beside LoRA")
    parser.add_argument(
        "--vary", nargs="+", metavar=("WHAT", "VALUE"), help="rank, layers or batch, and the values to try in its place"
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each method")
    parser.add_argument("--steps", type=int, default=8, help="measured steps in a turn")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of the engine; 0 for none")
    parser.add_argument(
        "--layers", nargs=4, type=int, metavar=("L", "N", "M", "R"), default=[96, 768, 1024, 8], help="engine's shapes"
    )
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's precision")
    parser.add_argument(
        "--time",
        choices=list(CLOCKS),
        default="wall",
        help="the processor's time leaves out what else the machine does",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/step.json"))
    return parser


if __name__ == "__main__":
    main()
