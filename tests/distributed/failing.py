"""A script whose rank 1 fails in the middle of training while rank 0 continues; started by torchrun, or as it is.

Arguments: the front end, and what fails: "callback", or the number of the call of training_step or
compute_loss that raises, or that returns None if "None" follows.
"""

import os
import sys
from typing import Any

import lightning as L
import torch
from fits import Sharded, parts
from float64_runs import dataset, fit_in_float64, network

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class FailingCallback(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if RANK == 1 and trainer.global_step == 2:
            raise ValueError("rank 1 fails")


def make_fail(module: Any, name: str, last_call: int, without_loss: bool) -> None:
    """Let a method fail on rank 1 when it is called for the last time."""
    original, calls = getattr(module, name), []

    def failing(batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if RANK == 0 or len(calls) < last_call:
            return original(batch, batch_idx)
        if without_loss:
            return None
        raise ValueError("rank 1 fails")

    setattr(module, name, failing)


def main(front_end: str, what: str, returned: str = "") -> None:
    torch.set_num_threads(1)
    module, callbacks, trainer = parts(front_end, network(), accumulate=2)
    if what == "callback":
        callbacks.append(FailingCallback())
    else:
        name = "compute_loss" if front_end == "FMLoRAModule" else "training_step"
        make_fail(module, name, int(what), returned == "None")
    loader = Sharded(dataset(), 2, RANK)
    fit_in_float64(module, 1, callbacks, loader, strategy="ddp", devices=2, use_distributed_sampler=False, **trainer)
    print("trained to the end")


if __name__ == "__main__":
    main(*sys.argv[1:])
