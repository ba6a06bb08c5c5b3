"""Peak memory of training, by method, each in its own process. Linux, CPU.

python -m recipes.benchmarks.memory --model roberta-large --methods all
"""

import json
import logging
import multiprocessing
import os
import platform
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

from recipes.benchmarks.methods import METHODS, OURS, train
from recipes.benchmarks.workloads import WORKLOADS
from recipes.command_line.options import known_names, parse_options


@dataclass(frozen=True)
class Options:
    """Settings of this benchmark, shown by ``--help``.

    Attributes:
        model: name of a workload.
        methods: methods to compare, or all.
        steps: training steps.
        output: output file, JSON.
    """

    model: str = "smollm2"
    methods: list[str] = field(default_factory=lambda: list(OURS))
    steps: int = 3
    output: Path = Path("runs/benchmarks/memory.json")


def peak() -> float:
    """Return the highest resident memory of this process so far, as the kernel reports it, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def measure(model: str, method: str, steps: int) -> float:
    """Train in this process and measure its memory.

    Args:
        model: a name of WORKLOADS.
        method: a name of METHODS.
        steps: training steps.

    Returns:
        Peak memory in MiB, less what the process used before it built the model.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before, how = peak(), METHODS[method]
    work = replace(WORKLOADS[model], full=how.full)
    batches = [work.example() for _ in range(steps)]
    train(how, work.network(), work.causal, batches, accelerator="cpu")
    return peak() - before


def measured(model: str, method: str, steps: int) -> float:
    """Measure in a fresh process, so that earlier measurements do not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, model, method, steps).result()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON, and return what was written."""
    options = parse_options(Options, arguments, "python -m recipes.benchmarks.memory", "Memory of a step, on the CPU.")
    known_names("--model", [options.model], WORKLOADS)
    methods = METHODS if "all" in options.methods else known_names("--methods", options.methods, METHODS)
    if platform.system() != "Linux":
        raise SystemExit("this benchmark reads /proc, which only Linux has")
    # For the child processes: freed memory goes back to the kernel at once, and is not counted.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {"torch": torch.__version__, "model": options.model, "steps": options.steps, "rows": rows}
    for method in methods:
        print(f"{options.model}, {method}", flush=True)
        rows.append({"method": method, "peak_mib": measured(options.model, method, options.steps)})
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(DataFrame(rows).to_string(index=False, float_format="{:.0f}".format))
    print(f"written to {options.output}")
    return result


if __name__ == "__main__":
    main()
