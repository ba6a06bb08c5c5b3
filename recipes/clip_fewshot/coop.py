"""CoOp's eleven data sets in CoOp's own parts, as its DATASETS.md lays out the files (arXiv 2109.01134).

Nine come with a file ``split_zhou_SET.json``. It holds the lists "train", "val" and "test" of ``[path, label, class
name]``, whose paths begin in the set's folder of images. FGVCAircraft has text files instead, and ImageNet has folders.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import folders
from recipes.clip_fewshot.folders import PARTS, Example, Parts
from recipes.shared.files import read_lines

GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_KEYS = dict(zip(PARTS, ("train", "val", "test"), strict=True))


class Layout(NamedTuple):
    """Where a set's files are, from the root on.

    Attributes:
        folder: of the set.
        images: folder of the images, in ``folder``.
        title: CoOp's name of the set, which is part of the split file's name.
        torchvision: where torchvision puts the same images, if elsewhere; from the root on.
    """

    folder: str
    images: str
    title: str
    torchvision: str | None = None


SETS = {
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "Caltech101", "caltech101/101_ObjectCategories"),
    "dtd": Layout("dtd", "images", "DescribableTextures", "dtd/dtd/images"),
    "eurosat": Layout("eurosat", "2750", "EuroSAT"),
    "fgvc_aircraft": Layout("fgvc_aircraft", "images", "FGVCAircraft", "fgvc-aircraft-2013b/data/images"),
    "flowers102": Layout("oxford_flowers", "jpg", "OxfordFlowers", "flowers-102/jpg"),
    "food101": Layout("food-101", "images", "Food101"),
    "imagenet": Layout("imagenet", "images", "ImageNet"),
    "oxford_pets": Layout("oxford_pets", "images", "OxfordPets", "oxford-iiit-pet/images"),
    "stanford_cars": Layout("stanford_cars", ".", "StanfordCars"),
    "sun397": Layout("sun397", "SUN397", "SUN397", "SUN397"),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "UCF101"),
}


class Labelled(NamedTuple):
    """What a set holds.

    Attributes:
        classes: as the data call them; a label is an index of this list.
        names: the words that CoOp has for each class.
        parts: (path, label) by part.
    """

    classes: Sequence[str]
    names: Sequence[str]
    parts: Parts


def read(dataset: str, root: str) -> Labelled:
    """The images of CoOp's parts; none is opened.

    Args:
        dataset: a key of :data:`SETS`.
        root: the folder that DATASETS.md calls $DATA. Images are also found where torchvision puts them in it.

    Raises:
        MisconfigurationException: the set is unknown, files are missing, or the split file is broken or another set's.
    """
    if dataset not in SETS:
        raise MisconfigurationException(
            f"split='coop' is for the data sets {', '.join(SETS)}, got dataset={dataset!r}: set split to official or "
            "seeded"
        )
    folder, images = Path(root).expanduser() / SETS[dataset].folder, _images(dataset, root)
    if dataset == "imagenet":
        labelled = _imagenet(folder, images)
    elif dataset == "fgvc_aircraft":
        labelled = _aircraft(images)
    else:
        labelled = _split_file(folder / f"split_zhou_{SETS[dataset].title}.json", images)
    return labelled


def _images(dataset: str, root: str) -> Path:
    """The folder of a set's images: CoOp's, or else torchvision's."""
    layout, data = SETS[dataset], Path(root).expanduser()
    candidates = [data / layout.folder / layout.images]
    if layout.torchvision:
        candidates.append(data / layout.torchvision)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MisconfigurationException(
        f"dataset={dataset!r}, split='coop': there is no folder {' nor '.join(map(str, candidates))}. Set root to the "
        f"folder that holds the data sets as {GUIDE} lays them out"
    )


# -- split files


def _split_file(file: Path, images: Path) -> Labelled:
    if not file.is_file():
        raise MisconfigurationException(
            f"split='coop': there is no {file}. {GUIDE} links to it; with split official or seeded the parts are "
            "others than CoOp's"
        )
    names: dict[int, str] = {}
    parts: Parts = {part: [] for part in PARTS}
    try:
        split = json.loads(file.read_text(encoding="utf-8-sig"))
        for part, key in _KEYS.items():
            for path, label, name in split[key]:
                if names.setdefault(label, name) != name:
                    raise ValueError(f"label {label} is both {names[label]!r} and {name!r}")
                parts[part].append((images / path, label))
        classes = [names[label] for label in range(len(names))]
    except (KeyError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"{file} is no split file of CoOp's, a JSON object of the lists {', '.join(_KEYS.values())} of "
            f"[path, label, class name], with labels from 0 on: {type(error).__name__}: {error}"
        ) from error
    _check_there(file, images, parts)
    return Labelled(classes, [name.replace("_", " ") for name in classes], parts)


def _check_there(file: Path, images: Path, parts: Parts) -> None:
    """Refuse a list of images that are not all there, so that training does not fail hours later at a missing one."""
    paths = [path for path, _ in chain.from_iterable(parts.values())]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise MisconfigurationException(
            f"{len(missing)} of the {len(paths)} images that {file} names are not in {images}, the first: "
            f"{missing[0]}. Complete them, or is it another set's file?"
        )


# -- the two sets without one


def _aircraft(images: Path) -> Labelled:
    """FGVCAircraft, whose official parts CoOp takes."""
    classes = _lines(images.parent / "variants.txt")
    parts: Parts = {}
    for part, key in _KEYS.items():
        file = images.parent / f"images_variant_{key}.txt"
        parts[part] = []
        for line in _lines(file):
            number, _, name = line.partition(" ")
            if name not in classes:
                raise MisconfigurationException(f"{file}: {name!r} is not one of the classes in variants.txt")
            parts[part].append((images / f"{number}.jpg", classes.index(name)))
        _check_there(file, images, {part: parts[part]})
    return Labelled(classes, classes, parts)


def _imagenet(folder: Path, images: Path) -> Labelled:
    """ImageNet, tested on its validation images; what validates is drawn from train."""
    classes = folders.class_folders(images / "train")
    folders.check_same(images / "val", classes, folders.class_folders(images / "val"))
    file = folder / "classnames.txt"
    words = {}
    for line in _lines(file):
        name, _, word = line.partition(" ")
        words[name] = word
    unnamed = [name for name in classes if not words.get(name)]
    if unnamed:
        raise MisconfigurationException(f"{file} has no name for {len(unnamed)} classes, the first: {unnamed[0]}")
    parts: dict[str, list[Example]] = {}
    for part, name in (("train", "train"), ("test", "val")):
        parts[part] = folders.images_of(images / name, classes)
    return Labelled(classes, [words[name] for name in classes], parts)


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    if not file.is_file():
        raise MisconfigurationException(f"split='coop': there is no {file}. {GUIDE} says where to get it")
    return [line.strip() for line in read_lines(file) if line.strip()]
