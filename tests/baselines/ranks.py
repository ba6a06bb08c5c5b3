"""Runs of the baselines on several processes, and alone on the joint batches."""

import os
from typing import Any

import torch
from ddp_runs import joint_batches, trained
from fits import PRECISION_OF_FLOAT64, Sharded, ShardedAutomatic
from float64_runs import dataset, fit_in_float64, network
from helpers import BASELINES, SIZES
from strategies import full_weights, strategy_of


def train(
    name: str, strategy: str | None = None, accumulate: int = 1, loader: Any = None, **settings: Any
) -> dict[str, Any]:
    """The trained weights, whole; without a strategy of one process on the joint batches."""
    net = network()
    module, callback = ShardedAutomatic(net), BASELINES[name](SIZES[name], **settings)
    if strategy is None:
        alone = joint_batches() if loader is None else loader
        module.configure_model = lambda: None
        fit_in_float64(module, 1, [callback], alone, accumulate_grad_batches=accumulate)
        return {"weights": trained(net)}
    precision, double = PRECISION_OF_FLOAT64[strategy.partition("-")[0]]
    used = strategy_of(strategy, **double)
    ranks = {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "use_distributed_sampler": False, "strategy": used}
    loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    torch.manual_seed(int(os.environ["RANK"]))  # noise must not come from the global generator
    fit_in_float64(module, 1, [callback], loader, precision=precision, accumulate_grad_batches=accumulate, **ranks)
    return {"weights": full_weights(used, net)}
