"""Where images come from: torchvision's data sets, folders, and the packaged emoji; split into three parts."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from recipes.clip_demo import emoji
from recipes.clip_fewshot.prompts import DEFAULT_TEMPLATES, TEMPLATES

Example = tuple[Path, int]
Parts = dict[str, list[Example]]
Found = tuple[Sequence[str], Parts]
Split = Literal["official", "seeded"]
PARTS = ("train", "validation", "test")
_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_SHARES = (0.5, 0.2, 0.3)  # of train, validation and test in a seeded split: CoOp's


@dataclass(frozen=True)
class Source:
    """Images with labels, in parts.

    Attributes:
        name: of the data set.
        classes: as the data call them; a label is a place in this list.
        parts: (path, label) of "train", "test" and, where there is one, "validation".
        templates: texts with {} for a class's name.
        note: how the parts came about.
    """

    name: str
    classes: Sequence[str]
    parts: Parts
    templates: Sequence[str]
    note: str


def load(dataset: str, root: str = "data", split: Split = "official", split_seed: int = 0) -> Source:
    """Read which images there are, but no image.

    Args:
        dataset: a key of :data:`KNOWN`, or a folder with one folder for each class, or with folders train, test and
            perhaps validation that hold these.
        root: folder of torchvision's data sets.
        split: the parts that the data come in, where they come in any; "seeded" divides all images anew.
        split_seed: of that division.

    Raises:
        MisconfigurationException: missing folder, class without images, or parts that differ in their classes.
    """
    classes, parts = KNOWN[dataset](root) if dataset in KNOWN else _folder(dataset)
    note = "the parts that the data come in"
    if split == "seeded" or "test" not in parts:
        parts = divided([example for part in PARTS for example in parts.get(part, [])], split_seed)
        note = f"50/20/30 % of each class, divided by split_seed={split_seed}"
    source = Source(dataset, classes, parts, TEMPLATES.get(dataset, DEFAULT_TEMPLATES), note)
    _check_classes(source)
    return source


def fetch(dataset: str, root: str, download: bool) -> None:
    """Download a torchvision data set, or make the packaged one, unless it is there; on one process.

    Raises:
        MisconfigurationException: the download failed.
    """
    if dataset == "packaged:emoji":
        KNOWN[dataset](root)
    elif download and dataset in _TORCHVISION:
        try:
            _TORCHVISION[dataset](root, download=True)
        except Exception as error:  # of the network, of the archive, of the disk
            raise MisconfigurationException(
                f"dataset={dataset!r} can't be downloaded into root={root!r}: {type(error).__name__}: {error}"
            ) from error


def in_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffled by a hash of the seed and the last two parts of the path: the same on every machine.

    An image's place among the others of its class does not depend on which others there are.
    """

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/{'/'.join(example[0].parts[-2:])}".encode()).digest()

    return sorted(examples, key=place)


def by_class(examples: Iterable[Example]) -> dict[int, list[Example]]:
    """The examples of each label, in their order."""
    found = defaultdict(list)
    for example in examples:
        found[example[1]].append(example)
    return dict(found)


def divided(examples: Sequence[Example], seed: int) -> Parts:
    """Half of each class for training, a fifth for validation, the rest for testing, drawn by the seed."""
    parts: Parts = {part: [] for part in PARTS}
    for _, own in sorted(by_class(examples).items()):
        shuffled = in_order(own, seed)
        first = round(len(own) * _SHARES[0])
        second = first + round(len(own) * _SHARES[1])
        for part, chosen in zip(PARTS, (shuffled[:first], shuffled[first:second], shuffled[second:]), strict=True):
            parts[part] += chosen
    return parts


# -- torchvision's


def _eurosat(root: str) -> Found:
    data = _opened("eurosat", root)
    return data.classes, {"train": [(Path(path), label) for path, label in data.samples]}


def _dtd(root: str) -> Found:
    parts = {part: _opened("dtd", root, split=name) for part, name in zip(PARTS, ("train", "val", "test"), strict=True)}
    return parts["train"].classes, {part: _files(data) for part, data in parts.items()}


def _flowers102(root: str) -> Found:
    named = zip(PARTS, ("train", "val", "test"), strict=True)
    parts = {part: _files(_opened("flowers102", root, split=name)) for part, name in named}
    return datasets.Flowers102.classes, parts


def _oxford_pets(root: str) -> Found:
    parts = {part: _opened("oxford_pets", root, split=name) for part, name in (("train", "trainval"), ("test", "test"))}
    return parts["train"].classes, {part: _files(data, "_images") for part, data in parts.items()}


def _caltech101(root: str) -> Found:
    data = _opened("caltech101", root)
    classes = [name for name in data.categories if name != "Faces_easy"]  # the images of Faces, cropped: CoOp's choice
    named = [(data.categories[label], number) for label, number in zip(data.y, data.index, strict=True)]
    folder = Path(data.root) / "101_ObjectCategories"
    images = [(folder / name / f"image_{number:04d}.jpg", name) for name, number in named if name in classes]
    return classes, {"train": [(path, classes.index(name)) for path, name in images]}


_TORCHVISION: dict[str, Callable[..., Any]] = {
    "eurosat": datasets.EuroSAT,
    "dtd": datasets.DTD,
    "flowers102": datasets.Flowers102,
    "oxford_pets": datasets.OxfordIIITPet,
    "caltech101": datasets.Caltech101,
}


def _opened(dataset: str, root: str, **options: Any) -> Any:
    try:
        return _TORCHVISION[dataset](root, **options)
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


# -- folders, and what is packaged


def _folder(dataset: str) -> Found:
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        raise MisconfigurationException(
            f"dataset={dataset!r} is no folder, and not one of {', '.join(sorted(KNOWN))}: "
            "name one of these, or a folder with one folder for each class"
        )
    found = {part: [folder / name for name in names if (folder / name).is_dir()] for part, names in _FOLDERS.items()}
    if not found["train"] and not found["test"]:
        classes = _class_folders(folder)
        return classes, {"train": _images(folder, classes)}
    missing = [part for part in ("train", "test") if not found[part]]
    if missing:
        raise MisconfigurationException(
            f"dataset={dataset!r} has no folder {missing[0]!r}: give it both train and test, or neither and one folder "
            "for each class, which are then divided by split_seed"
        )
    parts = {part: folders[0] for part, folders in found.items() if folders}
    classes = _class_folders(parts["train"])
    for path in parts.values():
        _check_same(path, classes, _class_folders(path))
    return classes, {part: _images(path, classes) for part, path in parts.items()}


def _class_folders(folder: Path) -> list[str]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise MisconfigurationException(f"{folder} holds no folder: it needs one for each class, with its images")
    return classes


def _images(folder: Path, classes: Sequence[str]) -> list[Example]:
    found = []
    for label, name in enumerate(classes):
        paths = image_files(folder / name)
        if not paths:
            raise MisconfigurationException(
                f"class {name!r} is empty: {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)})"
            )
        found += [(path, label) for path in paths]
    return found


def image_files(folder: Path) -> list[Path]:
    """All files below a folder whose name ends like an image's, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


def _check_same(folder: Path, expected: Sequence[str], found: Sequence[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise MisconfigurationException(
            f"the classes of {folder} are not those of train: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )


def _check_classes(source: Source) -> None:
    for part in ("train", "test"):
        labels = {label for _, label in source.parts[part]}
        empty = [name for label, name in enumerate(source.classes) if label not in labels]
        if empty:
            raise MisconfigurationException(
                f"{source.name}: class {empty[0]!r} has no image in {part} ({source.note}), nor have "
                f"{len(empty) - 1} others: every class needs some in train and in test"
            )


def _emoji(root: str) -> Found:
    return _folder(str(emoji.prepare().target))


KNOWN: dict[str, Callable[[str], Found]] = {
    "eurosat": _eurosat,
    "dtd": _dtd,
    "flowers102": _flowers102,
    "oxford_pets": _oxford_pets,
    "caltech101": _caltech101,
    "packaged:emoji": _emoji,
}
