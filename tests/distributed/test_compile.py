"""torch.compile under DDP: the same weights as without it, and only two graphs, one clean and one perturbed."""

import os
import shutil
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from fits import E_of, assert_equal_to_one_process, in_float64, own_share, parts, train_alone
from float64_runs import fit_in_float64, network, trained
from launch import Results, Runs, launch
from torch._dynamo.utils import counters

BATCHES = 6
RUNS: dict[str, dict[str, Any]] = {
    "EFMLoRA, network": {"front_end": "EFMLoRA", "compiled": "net"},
    "FMLoRA, module": {"front_end": "FMLoRA", "compiled": "module"},
    "EFMLoRA beside FMLoRAModule, network": {"front_end": "EFMLoRA+FMLoRAModule", "compiled": "net", "accumulate": 2},
}
INDUCTOR = {"FMLoRA, inductor": {"front_end": "FMLoRA", "compiled": "net", "backend": "inductor"}}
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
NAMES = [*RUNS, *(pytest.param(name, marks=needs_compiler) for name in INDUCTOR)]
RUNS |= INDUCTOR


class CountsGraphs(L.Callback):
    """The number of graphs compiled so far, after each batch."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


def train(
    front_end: str,
    compiled: str | None = None,
    accumulate: int = 1,
    backend: str = "aot_eager",
    cache: str | None = None,
) -> dict[str, Any]:
    """Train on this rank's half of each batch.

    Args:
        front_end: see fits.parts.
        compiled: "net" for the network in the module, "module" for the LightningModule, None for neither.
        accumulate: batches per step.
        backend: torch.compile's.
        cache: inductor's folder. With kernels of earlier runs in the user's folder, a run restricted to AVX2 gave nan.
    """
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch.compiler.reset()
    counters.clear()
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate)
    if compiled == "net":
        module.net = torch.compile(net, backend=backend)
    count = CountsGraphs()
    fitted = torch.compile(module, backend=backend) if compiled == "module" else module
    fit_in_float64(
        fitted, 1, [*callbacks, count], own_share(), limit_train_batches=BATCHES, **trainer, **in_float64("ddp")
    )
    return {"weights": trained(net), "E": E_of(module, callbacks), "graphs": count.graphs}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for name, arguments in RUNS.items():
        if name not in INDUCTOR:
            runs[name] = partial(train, **arguments)
        elif HAS_COMPILER:
            runs[name] = partial(train, **arguments, cache=str(tmp_path_factory.mktemp("inductor")))
    return launch(tmp_path_factory.mktemp("compile"), runs)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_run_equals_the_plain_one(results: Results, name: str) -> None:
    """The run of one process on the joint batches, which test_ddp.py shows to equal DDP's."""
    alone = train_alone(RUNS[name]["front_end"], RUNS[name].get("accumulate", 1), epochs=1, batches=BATCHES)
    assert_equal_to_one_process(results[name], alone)


@pytest.mark.parametrize("name", NAMES)
def test_switching_the_perturbation_on_and_off_compiles_nothing_anew(results: Results, name: str) -> None:
    for rank in results[name]:
        assert rank["graphs"][0] >= 1  # it is really compiled
        assert rank["graphs"][1:] == [2] * (len(rank["graphs"]) - 1)
