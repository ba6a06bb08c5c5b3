"""What fails on one rank alone ends that rank at once, with an exit code by which its launcher ends the others."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from fits import Sharded, parts
from float64_runs import dataset, fit_in_float64, network
from launch import run_on

LONG = 150  # seconds; a hang lasts for gloo's half an hour
CASES = {  # the front end and what fails on rank 1, and what that says
    # Rank 0 waits in FMLoRA's own all-reduce, in a batch that DDP does not synchronize.
    "the ascent of an accumulating batch": (("FMLoRA", 5), "ValueError: rank 1 fails"),
    "a callback": (("EFMLoRA", None), "ValueError: rank 1 fails"),
    "a loss that the other rank has": (("FMLoRAModule", 3), "compute_loss returned None on one of several ranks"),
}


class FailingCallback(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise ValueError("rank 1 fails")


def make_fail(module: Any, name: str, last_call: int, rank: int) -> None:
    """Let training_step raise, or compute_loss return None, on rank 1 when it is called for the last time."""
    original, calls = getattr(module, name), []

    def failing(batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if rank == 0 or len(calls) < last_call:
            return original(batch, batch_idx)
        if name == "compute_loss":
            return None
        raise ValueError("rank 1 fails")

    setattr(module, name, failing)


def train(front_end: str, last_call: int | None) -> None:
    """What each process does; without a number of a call it is a callback that fails."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    module, callbacks, trainer = parts(front_end, network(), accumulate=2)
    if last_call is None:
        callbacks.append(FailingCallback())
    else:
        make_fail(module, "compute_loss" if front_end == "FMLoRAModule" else "training_step", last_call, rank)
    loader = Sharded(dataset(), 2, rank)
    fit_in_float64(module, 1, callbacks, loader, strategy="ddp", devices=2, use_distributed_sampler=False, **trainer)
    print("trained to the end")


@pytest.mark.parametrize("case", CASES)
def test_a_failure_of_one_rank_ends_all(case: str, tmp_path: Path) -> None:
    arguments, error = CASES[case]
    output = tmp_path / "output.txt"
    codes = run_on(2, train, *arguments, output=output, timeout=LONG)
    said = output.read_text()
    assert codes[1] == 1, said
    assert error in said
    assert "trained to the end" not in said
