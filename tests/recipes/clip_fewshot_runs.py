"""A tiny random CLIP, generated images in folders, and runs of the few-shot recipe through its command line."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from clip_contrastive_runs import CLIP, TEXT, save_model
from PIL import Image
from strategies import full_weights
from torch.distributed.fsdp import FullyShardedDataParallel

from recipes.clip_fewshot.__main__ import main
from recipes.clip_fewshot.data import FewShotData
from recipes.shared.configs import STRATEGIES, config_arguments

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue_grey": (90, 110, 130)}


def tiny_clip(folder: Path) -> str:
    """A random CLIP of two small towers of ViT-B-16-quickgelu's kind, as open_clip names it."""
    return save_model(folder, CLIP | {"text_cfg": TEXT | {"context_length": 16}, "quick_gelu": True})


def picture(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """Write a noisy image around a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (40, 50, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def filled(folder: Path, number: int) -> Path:
    """The folder, with one folder of images for each colour in it."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(number):
            picture(folder / name / f"{i:02d}.png", colour, 100 * label + i)
    return folder


def options_of(model: str, images: str) -> list[str]:
    """Arguments of a short run."""
    return [
        f"--model.init_args.model={model}",
        "--model.init_args.pretrained=null",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3",
        f"--data.init_args.dataset={images}",
        "--data.init_args.shots=2",
        "--data.init_args.iterations_per_shot=3",
        "--data.init_args.batch_size=4",
    ]


def run(command: str, folder: str, method: str, strategy: str, options: list[str]) -> dict[str, Any]:
    """One command of the recipe in a folder.

    Args:
        command: fit, test or predict.
        folder: in which it leaves what it leaves.
        method: whose configurations are taken.
        strategy: ddp, fsdp1 or fsdp2; or "one" for a single process. FSDP1 gets a class that Lightning lets run
            without a GPU, and keeps what the YAML says of it.
        options: more arguments.

    Returns:
        The trained weights, whole, by name; what was logged last; optimizer steps; FSDP1's units.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    arguments = [command, *config_arguments("clip_fewshot", method)]
    if strategy == "one":
        arguments.append("--trainer.devices=1")
    else:
        arguments += [f"--config={STRATEGIES / strategy}.yaml", f"--trainer.devices={os.environ['WORLD_SIZE']}"]
    if strategy == "fsdp1":
        arguments.append("--trainer.strategy.class_path=strategies.FSDPOnCPU")
    cli = main([*arguments, "--trainer.accelerator=cpu", *options])
    return {
        "weights": full_weights(cli.trainer.strategy, cli.model.net),
        "logged": {name: value.item() for name, value in cli.trainer.callback_metrics.items()},
        "steps": cli.trainer.global_step,
        "units": len(FullyShardedDataParallel.fsdp_modules(cli.trainer.strategy.model)),
    }


def data_of(images: Path, **options: Any) -> FewShotData:
    given = {"shots": 2, "batch_size": 4, "iterations_per_shot": 4, "eval_batch_size": 5} | options
    return FewShotData(str(images), **given)
