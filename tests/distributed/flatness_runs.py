"""Runs with a FlatnessMonitor, on two ranks and alone."""

from typing import Any

import torch
from ddp_runs import joint_batches, on_two_ranks, trained
from fits import parts
from float64_runs import fit_in_float64, network
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from strategies import strategy_of

from lightning_flatlora import EFMLoRA, FlatnessMonitor
from lightning_flatlora.flatness import MEASURES


class Logged(Callback):
    """What the monitor has measured, after every batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.rows.append({name: value.clone() for name, value in metrics.items() if name.startswith("flatness/")})


def train(
    front_end: str, accumulate: int = 1, monitored: bool = True, alone: bool = False, **strategy: Any
) -> dict[str, Any]:
    """The trained weights, and all measures every five optimizer steps; of half of each batch, or of it all."""
    net = network()
    loader, trainer = (joint_batches(), {}) if alone else on_two_ranks(**strategy)
    module, callbacks, step = parts(front_end, net, accumulate)
    ema = callbacks and isinstance(callbacks[0], EFMLoRA)
    # The largest eigenvalue takes longer than all others together.
    wanted = {"ema": ema, "top_eigenvalue": front_end == "LoRA"}
    measures = [name for name in MEASURES if wanted.get(name, True)]
    monitor = FlatnessMonitor(0.3, every_n_steps=5, batches=2, measures=measures, samples=2, per_layer=True)
    logged = Logged()
    used = [*([monitor] if monitored else []), *callbacks, logged]
    fit_in_float64(module, 1, used, loader, limit_train_batches=12, **step, **trainer)
    return {"weights": trained(net), "rows": logged.rows}


def refused(strategy: str) -> dict[str, Any]:
    """The message for a sharded model."""
    loader, trainer = on_two_ranks()
    module, callbacks, step = parts("EFMLoRA", network().float(), 1)
    trainer |= {"strategy": strategy_of(strategy), "precision": "32-true"}
    loader.dataset.tensors = tuple(x.float() if x.is_floating_point() else x for x in loader.dataset.tensors)
    try:
        fit_in_float64(module, 1, [FlatnessMonitor(), *callbacks], loader, **step, **trainer)
    except MisconfigurationException as error:
        return {"message": str(error), "grad": torch.is_grad_enabled()}
    raise AssertionError("it was not refused")
