"""Runs of the recipe through its command line, in one process or as one of several."""

import os
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
from strategies import full_weights
from torch.distributed.fsdp import FullyShardedDataParallel

from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import STRATEGIES, config_arguments


def run(
    command: str, folder: str, method: str, strategy: str, options: list[str], recipe: str = "instruction_tuning"
) -> dict[str, Any]:
    """One command of the recipe in a folder.

    Args:
        command: fit, test or predict.
        folder: in which it leaves what it leaves.
        method: whose configurations are taken.
        strategy: one that has a configuration, or "one" for a single process. FSDP1 gets a class that Lightning lets
            run without a GPU, and keeps what the YAML says of it.
        options: more arguments.
        recipe: name of its folder.

    Returns:
        The trained weights, whole, by name; what was logged last; optimizer steps; FSDP1's units.
    """
    datasets.disable_progress_bars()
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    arguments = [command, *config_arguments(recipe, method)]
    if strategy == "one":
        arguments.append("--trainer.devices=1")
    else:
        arguments += [f"--config={STRATEGIES / strategy}.yaml", f"--trainer.devices={dist_size()}"]
    if strategy == "fsdp1":
        arguments.append("--trainer.strategy.class_path=strategies.FSDPOnCPU")
    cli = RecipeCLI([*arguments, "--trainer.accelerator=cpu", *options])
    used = cli.trainer.strategy
    return {
        "weights": full_weights(used, cli.model.net),
        "logged": {name: value.item() for name, value in cli.trainer.callback_metrics.items()},
        "steps": cli.trainer.global_step,
        "units": len(FullyShardedDataParallel.fsdp_modules(used.model)),
    }


def dist_size() -> int:
    """Processes of this launch."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
