"""Where images come from: CoOp's data sets, folders, and the packaged emoji; each in three parts."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import coop, folders
from recipes.clip_fewshot.folders import PARTS, Example, Parts
from recipes.data.left_out import few
from recipes.offline import emoji

EMOJI = "packaged:emoji"
Split = Literal["official", "seeded"]
_SHARES = (0.5, 0.2, 0.3)  # of train, validation and test in a seeded split: CoOp's


@dataclass(frozen=True)
class Source:
    """Images with labels, in parts.

    Attributes:
        name: name of the data set.
        classes: classes as the data name them; a label is an index into this list.
        names: words for the classes.
        parts: (path, label) of "train", "test" and, if there is one, "validation".
        note: how the parts were made.
    """

    name: str
    classes: Sequence[str]
    names: Sequence[str]
    parts: Parts
    note: str


def load_source(dataset: str, root: str = "data", split: Split = "official", split_seed: int = 0) -> Source:
    """Find the images of a data set, without opening any.

    Args:
        dataset: a data set of CoOp's, "packaged:emoji", or a folder with one folder per class, or with folders train,
            test and optionally validation that hold these.
        root: folder of CoOp's data sets.
        split: "official" keeps the data's own parts, if there are any; "seeded" divides all images again.
        split_seed: seed of that division.

    Raises:
        MisconfigurationException: files are missing, or a class has no images in a part.
    """
    if dataset in coop.SETS:
        classes, names, parts = coop.read(dataset, root)
    else:
        folder = emoji.prepare().target if dataset == EMOJI else Path(dataset).expanduser()
        if not folder.is_dir():
            raise MisconfigurationException(
                f"dataset={dataset!r} is not a folder, and not one of {', '.join([*coop.SETS, EMOJI])}: name one of "
                "these, or a folder with one folder per class"
            )
        classes, parts = folders.read(folder)
        names = [readable_name(name) for name in classes]
    note, needed = "the parts that the data come in", list(parts)
    if split == "seeded" or "test" not in parts:
        parts = split_within_classes(list(chain.from_iterable(parts.get(part, []) for part in PARTS)), split_seed)
        note, needed = f"50/20/30 % of each class, divided by split_seed={split_seed}", ["train", "test"]
    source = Source(dataset, classes, names, parts, note)
    _check_classes(source, needed)
    return source


def readable_name(folder: str) -> str:
    """Return a class's name as words, from the name of its folder.

    Example:
        >>> readable_name("AnnualCrop"), readable_name("great_masterwort")
        ('Annual Crop', 'great masterwort')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder)
    return re.sub(r"[_\s]+", " ", words).strip(" ?")


def in_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Return examples shuffled by a hash of the seed and the last two parts of the path: the same on every machine.

    An image's position relative to another of its class does not depend on the rest.
    """

    def digest(example: Example) -> bytes:
        name = f"{seed}/{'/'.join(example[0].parts[-2:])}"
        # A file name may hold bytes that are not UTF-8.
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    return sorted(examples, key=digest)


def by_class(examples: Iterable[Example]) -> dict[int, list[Example]]:
    """Return the examples of each label, in their order."""
    by_label = defaultdict(list)
    for example in examples:
        by_label[example[1]].append(example)
    return dict(by_label)


def split_within_classes(examples: Sequence[Example], seed: int) -> Parts:
    """Draw half of each class for training, a fifth for validation, and the rest for testing, by the seed."""
    parts: Parts = {part: [] for part in PARTS}
    for _, members in sorted(by_class(examples).items()):
        shuffled = in_order(members, seed)
        first = round(len(members) * _SHARES[0])
        second = first + round(len(members) * _SHARES[1])
        for part, chosen in zip(PARTS, (shuffled[:first], shuffled[first:second], shuffled[second:]), strict=True):
            parts[part] += chosen
    return parts


def _check_classes(source: Source, needed: Sequence[str]) -> None:
    if len(source.classes) < 2:
        raise MisconfigurationException(
            f"{source.name} has the classes {source.classes}: it needs at least two, each a folder with its images"
        )
    for part in needed:
        labels = {label for _, label in source.parts[part]}
        empty = [name for label, name in enumerate(source.classes) if label not in labels]
        if empty:
            raise MisconfigurationException(
                f"{source.name}: there are no images in {part} ({source.note}) of the classes {few(empty)}"
            )
