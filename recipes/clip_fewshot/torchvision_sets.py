"""The data sets that torchvision reads, and most of which it downloads, in the parts that they come in."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets

from recipes.clip_fewshot.folders import Example, Found

SETS: dict[str, Any] = {
    "caltech101": datasets.Caltech101,
    "dtd": datasets.DTD,
    "eurosat": datasets.EuroSAT,
    "fgvc_aircraft": datasets.FGVCAircraft,
    "flowers102": datasets.Flowers102,
    "food101": datasets.Food101,
    "oxford_pets": datasets.OxfordIIITPet,
    "sun397": datasets.SUN397,
}
_THREE = {"train": "train", "validation": "val", "test": "test"}
# What torchvision calls the parts of those that come in parts.
_SPLITS = {
    **dict.fromkeys(("dtd", "fgvc_aircraft", "flowers102"), _THREE),
    "food101": {"train": "train", "test": "test"},
    "oxford_pets": {"train": "trainval", "test": "test"},
}


def read(dataset: str, root: str) -> Found:
    """Classes, and (path, label) by part; all images as the part "train" where a set comes in no parts.

    Args:
        dataset: a key of :data:`SETS`.
        root: the folder in which torchvision's copy is.

    Raises:
        MisconfigurationException: it is not complete.
    """
    if dataset in _SPLITS:
        found = {part: _opened(dataset, root, split=split) for part, split in _SPLITS[dataset].items()}
        return found["test"].classes, {part: _files(data) for part, data in found.items()}
    data = _opened(dataset, root)
    if dataset == "caltech101":
        return _caltech101(data)
    # SUN397's "apartment_building/outdoor" is "outdoor apartment_building", as CoOp has it.
    classes = [" ".join(reversed(name.split("/"))) for name in data.classes]
    return classes, {"train": _files(data)}


def download(dataset: str, root: str) -> None:
    """Fetch a set unless it is there.

    Raises:
        MisconfigurationException: that failed.
    """
    try:
        SETS[dataset](root, download=True)
    except Exception as error:  # of the network, of the archive, of the disk
        raise MisconfigurationException(
            f"dataset={dataset!r} can't be downloaded into root={root!r}: {type(error).__name__}: {error}"
        ) from error


def _opened(dataset: str, root: str, **options: Any) -> Any:
    try:
        return SETS[dataset](root, **options)
    except Exception as error:  # of missing and of broken files
        raise MisconfigurationException(
            f"dataset={dataset!r} is not complete in root={root!r}: set root to the folder that holds torchvision's "
            f"copy, or download to true. {type(error).__name__}: {error}"
        ) from error


def _files(data: Any) -> list[Example]:
    """torchvision's own lists, by whichever name: asking for its items would decode every image."""
    if isinstance(data, datasets.ImageFolder):
        return [(Path(path), label) for path, label in data.samples]
    files = data._images if isinstance(data, datasets.OxfordIIITPet) else data._image_files
    return [(Path(path), label) for path, label in zip(files, data._labels, strict=True)]


def _caltech101(data: Any) -> Found:
    classes = [name for name in data.categories if name != "Faces_easy"]  # the images of Faces, cropped: CoOp's choice
    folder = Path(data.root) / "101_ObjectCategories"
    images = []
    for label, number in zip(data.y, data.index, strict=True):
        name = data.categories[label]
        if name in classes:
            images.append((folder / name / f"image_{number:04d}.jpg", classes.index(name)))
    return classes, {"train": images}
