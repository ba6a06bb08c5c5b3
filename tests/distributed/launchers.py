"""Training under the strategies that start processes of their own; what the main one has then is kept."""

from pathlib import Path
from typing import Any

import torch
from ddp_runs import trained
from fits import Sharded, parts
from float64_runs import dataset, fit_in_float64, network
from helpers import assert_no_trace
from lightning.pytorch import LightningDataModule

BATCHES = 9
RUNS = [
    ("ddp_spawn", "FMLoRA"),  # one only: each of its processes imports everything anew
    ("ddp_fork", "EFMLoRA"),
    ("ddp_fork", "EFMLoRA+FMLoRAModule"),
    ("ddp_notebook", "FMLoRA"),  # which is ddp_fork with another name
]


class Halves(LightningDataModule):
    """A rank's half of each batch; the rank is known only inside a process of the launcher."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return Sharded(dataset(), self.trainer.world_size, self.trainer.global_rank)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for strategy, front_end in RUNS:
        net = network()
        module, callbacks, trainer = parts(front_end, net, accumulate=2)
        trainer |= {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        trainer["limit_train_batches"] = BATCHES
        fit_in_float64(module, 1, callbacks, Halves(), **trainer)
        assert_no_trace(module)
        torch.save(trained(net), folder / f"{strategy}-{front_end}.pt")
