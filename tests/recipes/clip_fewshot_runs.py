"""A tiny random CLIP, generated images in folders, and arguments of short runs of the few-shot recipe."""

from pathlib import Path
from typing import Any

import numpy as np
from clip_contrastive_runs import CLIP, TEXT, save_model
from PIL import Image

from recipes.clip_fewshot.data import FewShotData

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


def data_of(images: Path, **options: Any) -> FewShotData:
    given = {"shots": 2, "batch_size": 4, "iterations_per_shot": 4, "eval_batch_size": 5} | options
    return FewShotData(str(images), **given)
