"""Runs of a recipe through its command line, in one process or as one of several."""

import os
from pathlib import Path
from typing import Any

import datasets
import lightning as L
from fits import full_weights
from one_command import one_command
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from recipes.command_line.cli import RecipeCLI
from recipes.command_line.configs import RECIPES, base_file, method_file
from recipes.instruction_tuning.data import InstructionData

STRATEGIES = RECIPES / "configs" / "strategies"


def config_arguments(recipe: str, method: str) -> list[str]:
    """Command-line arguments for the recipe's base and a method's overlay; "lora" means no overlay."""
    files = [base_file(recipe)] if method == "lora" else [base_file(recipe), method_file(recipe, method)]
    return [f"--config={path}" for path in files]


def packaged_arguments(recipe: str, method: str = "lora") -> list[str]:
    """A method's configurations with the recipe's packaged model and data."""
    base, *overlays = config_arguments(recipe, method)
    packaged = RECIPES / recipe / "configs" / "packaged.yaml"
    return [base, f"--config={packaged}", *overlays] if packaged.exists() else [base, *overlays]


def run(command: str, folder: str, recipe: str, method: str, strategy: str, options: list[str]) -> dict[str, Any]:
    """Run one of a recipe's commands in a folder.

    Args:
        command: fit, test or predict.
        folder: for all that the run writes.
        recipe: the name of its folder.
        method: selects the configurations.
        strategy: one that has a configuration, or "one" for a single process. FSDP1 gets a class that Lightning lets
            run without a GPU, but keeps its settings from the YAML.
        options: further arguments.

    Returns:
        The full trained weights by name, the last logged values, the number of optimizer steps, and FSDP1's units.
    """
    datasets.disable_progress_bars()
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    arguments = [command, *packaged_arguments(recipe, method)]
    if strategy == "one":
        arguments.append("--trainer.devices=1")
    else:
        arguments += [f"--config={STRATEGIES / strategy}.yaml", f"--trainer.devices={os.environ['WORLD_SIZE']}"]
    if strategy == "fsdp1":
        arguments.append("--trainer.strategy.class_path=fits.FSDPOnCPU")
    with one_command():
        cli = RecipeCLI([*arguments, "--trainer.accelerator=cpu", *options], recipe=recipe)
    used = cli.trainer.strategy
    # The contrastive loss's scale, which may be trained, is not part of the net.
    return {
        "weights": full_weights(used, cli.model if recipe == "clip_contrastive" else cli.model.net),
        "logged": {name: value.item() for name, value in cli.trainer.callback_metrics.items()},
        "steps": cli.trainer.global_step,
        "units": len(FullyShardedDataParallel.fsdp_modules(used.model)),
    }


def quick(command: str, configs: list[str], *options: str) -> RecipeCLI:
    """Run a command line in this process, with options that make it short and quiet on any machine.

    The recipe is the one whose base is among the configurations.
    """
    given = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    given += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    bases = [Path(config) for config in configs if config.endswith("/configs/base.yaml")]
    return RecipeCLI([command, *configs, *given, *options], recipe=bases[0].parts[-3] if bases else "")


def trained(cli: RecipeCLI) -> dict[str, Tensor]:
    """Copies of the trained weights."""
    return {name: p.detach().clone() for name, p in cli.model.named_parameters() if p.requires_grad}


def instruction_data(stage: str, tokenizer: str, **options: Any) -> InstructionData:
    """Instruction tuning's data, ready for a stage."""
    data = InstructionData(tokenizer=tokenizer, **{"validation_share": 0.15, "test_share": 0.25} | options)
    data.prepare_data()
    data.setup(stage)
    return data


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU, without checkpoints."""
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
