"""A tiny random CLIP, generated images in folders and in CoOp's layout, and arguments of short few-shot runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from clip_contrastive_runs import CLIP, TEXT, save_model
from PIL import Image

from recipes.clip_fewshot.data import FewShotData

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue_grey": (90, 110, 130)}


def tiny_clip(folder: Path) -> str:
    """A random CLIP with two small towers like those of ViT-B-16-quickgelu; returns open_clip's name for it."""
    return save_model(folder, CLIP | {"text_cfg": TEXT | {"context_length": 16}, "quick_gelu": True})


def picture(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """Write a noisy image around a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (40, 50, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def filled(folder: Path, number: int) -> Path:
    """The folder, filled with a folder of images for each colour."""
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


# -- small data sets in the layout of CoOp's DATASETS.md, with split files of its schema

FILES = {
    "caltech101": ("caltech-101/101_ObjectCategories", "caltech-101/split_zhou_Caltech101.json"),
    "dtd": ("dtd/images", "dtd/split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat/2750", "eurosat/split_zhou_EuroSAT.json"),
    "flowers102": ("oxford_flowers/jpg", "oxford_flowers/split_zhou_OxfordFlowers.json"),
    "food101": ("food-101/images", "food-101/split_zhou_Food101.json"),
    "oxford_pets": ("oxford_pets/images", "oxford_pets/split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "stanford_cars/split_zhou_StanfordCars.json"),
    "sun397": ("sun397/SUN397", "sun397/split_zhou_SUN397.json"),
    "ucf101": ("ucf101/UCF-101-midframes", "ucf101/split_zhou_UCF101.json"),
}
"""Folder of the images and split file of each set, as the guide shows them."""
NAMES = {
    "eurosat": ["Annual Crop Land", "Forest", "Sea or Lake"],
    "dtd": ["banded", "polka-dotted", "zigzagged"],
    "oxford_pets": ["abyssinian", "great_pyrenees", "wheaten_terrier"],
    "stanford_cars": ["2012 AM General Hummer SUV", "2012 McLaren MP4-12C Coupe", "2012 smart fortwo Convertible"],
}
"""Class names as they stand in these sets' split files."""


def write_set(root: Path, dataset: str, train: int = 4, val: int = 4, test: int = 3, images: str | None = None) -> Path:
    """Write a set of three classes, whose colours differ.

    Args:
        root: $DATA.
        dataset: a key of FILES.
        train: number of images per class.
        val: number of images per class.
        test: number of images per class.
        images: a folder for them that differs from CoOp's.

    Returns:
        The split file.
    """
    folder, file = FILES[dataset]
    names = NAMES.get(dataset, ["first_class", "second_class", "third_class"])
    split: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for label, (name, colour) in enumerate(zip(names, COLOURS.values(), strict=True)):
        counts = {"train": train, "val": val, "test": test}
        number = 0
        for part, count in counts.items():
            for _ in range(count):
                path = f"class_{label}/{dataset}_{label}_{number}.jpg"
                picture(root / (images or folder) / path, colour, 1000 * label + number)
                split[part].append((path, label, name))
                number += 1
    target = root / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(split))
    return target
