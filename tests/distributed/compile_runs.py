"""Runs under torch.compile and DDP, and how many graphs they compiled by the end of each step."""

import os
from typing import Any

import lightning as L
import torch
from ddp_runs import on_two_ranks, trained
from fits import parts
from float64_runs import fit_in_float64, network
from torch._dynamo.utils import counters

BATCHES = 6


class CountsGraphs(L.Callback):
    """How many graphs were compiled after each batch."""

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
        front_end: as in parts.
        compiled: "net" for the network in the module, "module" for the LightningModule, None for neither.
        accumulate: batches of a step.
        backend: of torch.compile.
        cache: inductor's folder. With the kernels of earlier runs in the user's one, a run held to AVX2 gave nan.
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
    loader, ranks = on_two_ranks()
    fitted = torch.compile(module, backend=backend) if compiled == "module" else module
    fit_in_float64(fitted, 1, [*callbacks, count], loader, limit_train_batches=BATCHES, **trainer, **ranks)
    driver = callbacks[0] if callbacks else module._callback
    return {"weights": trained(net), "E": driver.perturbation.state_dict()["E"], "graphs": count.graphs}
