"""Where images come from: CoOp's data sets, torchvision's, folders, and the packaged emoji; in three parts."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip import emoji
from recipes.clip_fewshot import coop, folders, torchvision_sets
from recipes.clip_fewshot.folders import PARTS, Example, Found, Parts

EMOJI = "packaged:emoji"
Split = Literal["official", "seeded", "coop"]
_SHARES = (0.5, 0.2, 0.3)  # of train, validation and test in a seeded split: CoOp's


@dataclass(frozen=True)
class Source:
    """Images with labels, in parts.

    Attributes:
        name: of the data set.
        classes: as the data call them; a label is an index of this list.
        parts: (path, label) of "train", "test" and, where there is one, "validation".
        note: how the parts came about.
        names: words for the classes, where they come with the data.
    """

    name: str
    classes: Sequence[str]
    parts: Parts
    note: str
    names: Sequence[str] | None = None


def load_source(dataset: str, root: str = "data", split: Split = "official", split_seed: int = 0) -> Source:
    """Read which images there are, but no image.

    Args:
        dataset: a data set of CoOp's, "packaged:emoji", or a folder with one folder for each class, or with folders
            train, test and perhaps validation that hold these.
        root: folder of CoOp's or torchvision's data sets.
        split: the parts that the data come in, where they come in any; "seeded" divides all images again; "coop" takes
            the parts of CoOp's split files.
        split_seed: of that division.

    Raises:
        MisconfigurationException: missing files, class without images, or parts that differ in their classes.
    """
    names = None
    if split == "coop":
        classes, names, parts = coop.read(dataset, root)
        note = "CoOp's parts"
    else:
        classes, parts = _found(dataset, root)
        note = "the parts that the data come in"
    if split == "seeded" or "test" not in parts:
        parts = split_within_classes(list(chain.from_iterable(parts.get(part, []) for part in PARTS)), split_seed)
        note = f"50/20/30 % of each class, divided by split_seed={split_seed}"
    source = Source(dataset, classes, parts, note, names)
    _check_classes(source)
    return source


def _found(dataset: str, root: str) -> Found:
    if dataset == EMOJI:
        return folders.read(str(emoji.prepare().target))
    if dataset in torchvision_sets.SETS:
        return torchvision_sets.read(dataset, root)
    if dataset in coop.SETS:
        raise MisconfigurationException(f"dataset={dataset!r} is read only in CoOp's parts: set split to coop")
    if not Path(dataset).expanduser().is_dir():
        raise MisconfigurationException(
            f"dataset={dataset!r} is no folder, and not one of {', '.join([*coop.SETS, EMOJI])}: name one of these, or "
            "a folder with one folder for each class"
        )
    return folders.read(dataset)


def fetch(dataset: str, root: str, download: bool) -> None:
    """Download a torchvision data set, or make the packaged one, unless it is there; on one process.

    Raises:
        MisconfigurationException: the download failed.
    """
    if dataset == EMOJI:
        emoji.prepare()
    elif download and dataset in torchvision_sets.SETS:
        torchvision_sets.download(dataset, root)


def in_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffled by a hash of the seed and the last two parts of the path: the same on every machine.

    An image's position among the others of its class does not depend on which others there are.
    """

    def digest(example: Example) -> bytes:
        name = f"{seed}/{'/'.join(example[0].parts[-2:])}"
        # A file's name may hold bytes that are no UTF-8.
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    return sorted(examples, key=digest)


def by_class(examples: Iterable[Example]) -> dict[int, list[Example]]:
    """The examples of each label, in their order."""
    by_label = defaultdict(list)
    for example in examples:
        by_label[example[1]].append(example)
    return dict(by_label)


def split_within_classes(examples: Sequence[Example], seed: int) -> Parts:
    """Half of each class for training, a fifth for validation, the rest for testing, drawn by the seed."""
    parts: Parts = {part: [] for part in PARTS}
    for _, members in sorted(by_class(examples).items()):
        shuffled = in_order(members, seed)
        first = round(len(members) * _SHARES[0])
        second = first + round(len(members) * _SHARES[1])
        for part, chosen in zip(PARTS, (shuffled[:first], shuffled[first:second], shuffled[second:]), strict=True):
            parts[part] += chosen
    return parts


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        raise MisconfigurationException(f"{source.name} has only the class {source.classes}: at least two are needed")
    for part in ("train", "test"):
        labels = {label for _, label in source.parts[part]}
        empty = [name for label, name in enumerate(source.classes) if label not in labels]
        if empty:
            raise MisconfigurationException(
                f"{source.name}: class {empty[0]!r} has no image in {part} ({source.note}), nor have "
                f"{len(empty) - 1} others: every class needs some in train and in test"
            )
