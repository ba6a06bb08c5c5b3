"""Strategies that start processes of their own bring back to the main one what DDP under torchrun trains."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import difference, train_alone, trained
from fits import Sharded, parts
from float64_runs import Manual, dataset, fit_in_float64, network
from helpers import assert_no_trace
from lightning.pytorch import LightningDataModule
from processes import run

from lightning_flatlora import EFMLoRA, FMLoRA

BATCHES = 9
FRONT_ENDS = ("FMLoRA", "EFMLoRA+FMLoRAModule")


class Halves(LightningDataModule):
    """A rank's half of each batch; the rank is known only inside a process of the launcher."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return Sharded(dataset(), self.trainer.world_size, self.trainer.global_rank)


def train(folder: Path) -> None:
    """What a main process does, from which two others are forked; what it has then is kept."""
    torch.set_num_threads(1)
    for front_end in FRONT_ENDS:
        net = network()
        module, callbacks, trainer = parts(front_end, net, accumulate=2)
        trainer |= {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
        fit_in_float64(module, 1, callbacks, Halves(), limit_train_batches=BATCHES, **trainer)
        assert_no_trace(module)
        torch.save(trained(net), folder / f"{front_end}.pt")


def test_the_main_process_has_the_weights_of_ddp(tmp_path: Path) -> None:
    """Those of one process on the joint batches, which test_ddp.py shows to be DDP's."""
    output = tmp_path / "output.txt"
    assert run(train, tmp_path, output=output) == 0, output.read_text()[-6000:]
    for front_end in FRONT_ENDS:
        expected = train_alone(front_end, accumulate=2, epochs=1, batches=BATCHES)["weights"]
        assert difference(torch.load(tmp_path / f"{front_end}.pt", weights_only=True), expected) < 1e-10


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, Manual])
def test_what_ddp_spawn_sends_to_its_processes_can_be_pickled(front_end: Any) -> None:
    net = {"net": network()} if front_end is Manual else {}
    copy = pickle.loads(pickle.dumps(front_end(rho=0.3, **net)))
    assert (copy._callback if net else copy).rho(0, 1.0) == 0.3
