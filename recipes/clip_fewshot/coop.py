"""CoOp's eleven data sets in CoOp's own parts, as its DATASETS.md lays out the files (arXiv 2109.01134).

Nine come with a file ``split_zhou_SET.json``. It holds the lists "train", "val" and "test" of ``[path, label, class
name]``, whose paths begin in the set's folder of images. FGVCAircraft has text files instead, and ImageNet has folders.
"""

import json
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import folders
from recipes.clip_fewshot.folders import PARTS, Parts
from recipes.data.files import read_lines

GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_KEYS = dict(zip(PARTS, ("train", "val", "test"), strict=True))


class Layout(NamedTuple):
    """Where a set's files are, relative to the root.

    Attributes:
        folder: folder of the set.
        images: folder of the images, in ``folder``.
        title: CoOp's name of the set, a part of the split file's name.
        torchvision: where torchvision puts the same images, if elsewhere; relative to the root.
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


Labelled = tuple[list[str], list[str], Parts]
"""Classes as the data name them, of which a label is an index; CoOp's words for them; and (path, label) by part."""


def read(dataset: str, root: str) -> Labelled:
    """Return the images of CoOp's parts, without opening them.

    Args:
        dataset: a key of :data:`SETS`.
        root: the folder that DATASETS.md calls $DATA. Images are also found at torchvision's places inside it.

    Raises:
        MisconfigurationException: files are missing or broken, or the split file belongs to another set.
    """
    layout, data = SETS[dataset], Path(root).expanduser()
    folder = data / layout.folder
    images = folder / layout.images
    if not images.is_dir() and layout.torchvision:
        images = data / layout.torchvision
    try:
        if dataset == "imagenet":
            return _imagenet(folder / "classnames.txt", images)
        if dataset == "fgvc_aircraft":
            classes, names, parts = _aircraft(images)
        else:
            classes, names, parts = _split_file(folder / f"split_zhou_{layout.title}.json", images)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"dataset={dataset!r}: the files in {folder} are not laid out as in {GUIDE}, which links to them: "
            f"{type(error).__name__}: {error}. Set root to the folder that holds the data sets"
        ) from error
    paths = [path for path, _ in chain.from_iterable(parts.values())]
    missing = [path for path in paths if not path.is_file()]
    if missing:  # so that training does not fail hours later
        raise MisconfigurationException(
            f"dataset={dataset!r}: {len(missing)} of its {len(paths)} images are not in {images}, the first: "
            f"{missing[0]}. Add them, or check that the lists of images belong to this set"
        )
    return classes, names, parts


def _split_file(file: Path, images: Path) -> Labelled:
    names: dict[int, str] = {}
    parts: Parts = {part: [] for part in PARTS}
    split = json.loads(file.read_text(encoding="utf-8-sig"))
    for part, key in _KEYS.items():
        for path, label, name in split[key]:
            if names.setdefault(label, name) != name:
                raise ValueError(f"{file.name}: label {label} is both {names[label]!r} and {name!r}")
            parts[part].append((images / path, label))
    classes = [names[label] for label in range(len(names))]
    return classes, [name.replace("_", " ") for name in classes], parts


def _aircraft(images: Path) -> Labelled:
    """Read FGVCAircraft in its official parts, as CoOp does."""
    classes = _lines(images.parent / "variants.txt")
    parts: Parts = {}
    for part, key in _KEYS.items():
        parts[part] = []
        for line in _lines(images.parent / f"images_variant_{key}.txt"):
            number, _, name = line.partition(" ")
            parts[part].append((images / f"{number}.jpg", classes.index(name)))
    return classes, classes, parts


def _imagenet(file: Path, images: Path) -> Labelled:
    """Read ImageNet: its validation images are the test part, and validation is drawn from train."""
    words = {}
    for line in _lines(file):
        name, _, word = line.partition(" ")
        words[name] = word
    classes, parts = folders.read(images)
    return classes, [words[name] for name in classes], parts


def _lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank."""
    return [line.strip() for line in read_lines(file) if line.strip()]
