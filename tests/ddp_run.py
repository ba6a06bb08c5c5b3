"""What each of two processes does in test_ddp.py: train in float64 and write what the rank ends with."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from test_exactness import RHO, SIZE, Automatic, Manual, dataset, fit, network
from torch.utils.data import DataLoader, DistributedSampler

from lightning_flatlora import EFMLoRA, FMLoRA


class Sharded(DataLoader):  # type: ignore[type-arg]
    """Batches of half the size, ranks taking turns on the samples: two ranks' batches make one of the full size."""

    def __init__(self, ranks: int, rank: int) -> None:
        data = dataset()
        sampler: Any = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
        super().__init__(data, batch_size=SIZE // ranks, sampler=sampler)


def main(front_end: str, accumulate: str, sync_ascent: str, folder: str) -> None:
    torch.set_num_threads(1)
    rank, count = int(os.environ["LOCAL_RANK"]), int(accumulate)
    net = network()
    flat = {"sync_ascent": sync_ascent == "True"}
    module: Any = Automatic(net)
    callbacks: list[Any] = [EFMLoRA(RHO)] if front_end == "EFMLoRA" else [FMLoRA(RHO, **flat)]
    trainer: dict[str, Any] = {"accumulate_grad_batches": count}
    if front_end == "FMLoRAModule":
        module = Manual(net, rho=RHO, accumulate_grad_batches=count, **flat)
        callbacks, trainer = [], {}
    fit(module, 2, callbacks, Sharded(2, rank), strategy="ddp", devices=2, use_distributed_sampler=False, **trainer)
    state = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    own = (callbacks[0] if callbacks else module._driver).perturbation.state_dict()["E"]
    torch.save({"weights": state, "E": own}, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
