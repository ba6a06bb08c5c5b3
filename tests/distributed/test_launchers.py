"""Processes that a strategy launches bring back what DDP under torchrun trains; if one fails, all end."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Sharded, difference, in_float64, own_share, parts, train_alone
from float64_runs import Manual, dataset, fit_in_float64, network, trained
from helpers import assert_no_trace
from launch import run_on
from lightning.pytorch import LightningDataModule
from processes import run

from lightning_flatlora import EFMLoRA, FMLoRA

BATCHES = 9
FRONT_ENDS = ("FMLoRA", "EFMLoRA+FMLoRAModule")


class Halves(LightningDataModule):
    """A rank's half of each batch; the rank is known only inside a launched process."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return Sharded(dataset(), self.trainer.world_size, self.trainer.global_rank)


def train(folder: Path) -> None:
    """Train in a main process, which forks two others, and keep the weights that it has afterwards."""
    torch.set_num_threads(1)
    for front_end in FRONT_ENDS:
        net = network()
        module, callbacks, trainer = parts(front_end, net, accumulate=2)
        trainer |= {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
        fit_in_float64(module, 1, callbacks, Halves(), limit_train_batches=BATCHES, **trainer)
        assert_no_trace(module)
        torch.save(trained(net), folder / f"{front_end}.pt")


def test_the_main_process_has_the_weights_of_ddp(tmp_path: Path) -> None:
    """They equal those of one process on the joint batches, which test_ddp.py shows to be DDP's."""
    output = tmp_path / "output.txt"
    assert run(train, tmp_path, output=output) == 0, output.read_text()[-6000:]
    for front_end in FRONT_ENDS:
        expected = train_alone(front_end, accumulate=2, epochs=1, batches=BATCHES)["weights"]
        assert difference(torch.load(tmp_path / f"{front_end}.pt", weights_only=True), expected) < 1e-10


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, Manual])
def test_what_ddp_spawn_sends_to_its_processes_can_be_pickled(front_end: Any) -> None:
    net = {"net": network()} if front_end is Manual else {}
    copy = pickle.loads(pickle.dumps(front_end(rho=0.3, **net)))
    assert (copy._callback if net else copy).rho == 0.3


# -- a failure of one rank


LONG = 150  # seconds; otherwise a hang would last for gloo's half an hour
CASES = {  # the front end, the call that fails on rank 1, and the error
    # Rank 0 waits in FMLoRA's own all-reduce, in a batch that DDP does not synchronize.
    "the ascent of an accumulating batch": (("FMLoRA", 5), "ValueError: rank 1 fails"),
    "a loss that the other rank has": (("FMLoRAModule", 3), "compute_loss returned None on one of several ranks"),
}


def make_fail(module: Any, name: str, last_call: int, rank: int) -> None:
    """Let the last call on rank 1 fail: training_step raises, or compute_loss returns None."""
    original, calls = getattr(module, name), []

    def failing(batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if rank == 0 or len(calls) < last_call:
            return original(batch, batch_idx)
        if name == "compute_loss":
            return None
        raise ValueError("rank 1 fails")

    setattr(module, name, failing)


def train_and_fail(front_end: str, last_call: int) -> None:
    """Train on each rank, one of which fails."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    module, callbacks, trainer = parts(front_end, network(), accumulate=2)
    make_fail(module, "compute_loss" if front_end == "FMLoRAModule" else "training_step", last_call, rank)
    fit_in_float64(module, 1, callbacks, own_share(), **in_float64("ddp"), **trainer)
    print("trained to the end")


@pytest.mark.parametrize("case", CASES)
def test_a_failure_of_one_rank_ends_all(case: str, tmp_path: Path) -> None:
    arguments, error = CASES[case]
    output = tmp_path / "output.txt"
    codes = run_on(2, train_and_fail, *arguments, output=output, timeout=LONG)
    said = output.read_text()
    assert codes[1] == 1, said
    assert error in said
    assert "trained to the end" not in said
