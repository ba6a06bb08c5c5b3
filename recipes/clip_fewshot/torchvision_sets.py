"""The data sets that torchvision reads, and most of which it downloads, in the parts that they come in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets

from recipes.clip_fewshot.folders import Example, Found


def read(dataset: str, root: str) -> Found:
    """Classes, and (path, label) by part; all images as the part "train" where a set comes in no parts.

    Args:
        dataset: a key of :data:`SETS`.
        root: the folder in which torchvision's copy is.

    Raises:
        MisconfigurationException: it is not complete.
    """
    return SETS[dataset].reads(dataset, root)


def download(dataset: str, root: str) -> None:
    """Fetch a set unless it is there.

    Raises:
        MisconfigurationException: that failed.
    """
    try:
        SETS[dataset].opens(root, download=True)
    except Exception as error:  # of the network, of the archive, of the disk
        raise MisconfigurationException(
            f"dataset={dataset!r} can't be downloaded into root={root!r}: {type(error).__name__}: {error}"
        ) from error


def _eurosat(dataset: str, root: str) -> Found:
    data = _opened(dataset, root)
    return data.classes, {"train": [(Path(path), label) for path, label in data.samples]}


def _sun397(dataset: str, root: str) -> Found:
    data = _opened(dataset, root)
    # "apartment_building/outdoor" is "outdoor apartment_building", as CoOp has it.
    classes = [" ".join(reversed(name.split("/"))) for name in data.classes]
    return classes, {"train": _files(data)}


def _caltech101(dataset: str, root: str) -> Found:
    data = _opened(dataset, root)
    classes = [name for name in data.categories if name != "Faces_easy"]  # the images of Faces, cropped: CoOp's choice
    named = [(data.categories[label], number) for label, number in zip(data.y, data.index, strict=True)]
    folder = Path(data.root) / "101_ObjectCategories"
    images = [(folder / name / f"image_{number:04d}.jpg", name) for name, number in named if name in classes]
    return classes, {"train": [(path, classes.index(name)) for path, name in images]}


def _in_parts(dataset: str, root: str, attribute: str = "_image_files", **splits: str) -> Found:
    """A set that comes in parts, by the names that torchvision has for them."""
    parts, classes = {}, []
    for part, split in splits.items():
        data = _opened(dataset, root, split=split)
        classes, parts[part] = data.classes, _files(data, attribute)
    return classes, parts


class Reader(NamedTuple):
    """How a set is read.

    Attributes:
        opens: torchvision's class.
        reads: takes the set's name and the root.
    """

    opens: Callable[..., Any]
    reads: Callable[[str, str], Found]


_three_parts = partial(_in_parts, train="train", validation="val", test="test")
_food101 = partial(_in_parts, train="train", test="test")
_oxford_pets = partial(_in_parts, train="trainval", test="test", attribute="_images")

SETS = {
    "caltech101": Reader(datasets.Caltech101, _caltech101),
    "dtd": Reader(datasets.DTD, _three_parts),
    "eurosat": Reader(datasets.EuroSAT, _eurosat),
    "fgvc_aircraft": Reader(datasets.FGVCAircraft, _three_parts),
    "flowers102": Reader(datasets.Flowers102, _three_parts),
    "food101": Reader(datasets.Food101, _food101),
    "oxford_pets": Reader(datasets.OxfordIIITPet, _oxford_pets),
    "sun397": Reader(datasets.SUN397, _sun397),
}


def _opened(dataset: str, root: str, **options: Any) -> Any:
    try:
        return SETS[dataset].opens(root, **options)
    except ImportError as error:
        raise MisconfigurationException(f"dataset={dataset!r} needs scipy: pip install scipy") from error
    except Exception as error:  # of missing and of broken files
        raise MisconfigurationException(
            f"dataset={dataset!r} is not complete in root={root!r}: set root to the folder that holds torchvision's "
            f"copy, or download to true. {type(error).__name__}: {error}"
        ) from error


def _files(data: Any, attribute: str = "_image_files") -> list[Example]:
    """torchvision's own lists: asking for its items would decode every image."""
    return [(Path(path), label) for path, label in zip(getattr(data, attribute), data._labels, strict=True)]
