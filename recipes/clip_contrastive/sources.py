"""Images and their captions from anything that `datasets` reads, a folder with texts, or a package."""

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip.images import PART_OF_FOLDER, Embedded, ImageFile, image_files
from recipes.data.files import read_lines
from recipes.data.left_out import few, warn_of_left_out
from recipes.data.reading import (
    is_packaged,
    packaged_names,
    packaged_task,
    read_errors,
    read_table,
    say_what_is_left_out,
)
from recipes.offline import emoji

Row = tuple[ImageFile | None, str, Any]
"""An image, its key, and its captions."""
_PARTS = {
    "emoji": "train",
    "emoji-held-out": "validation",
    "emoji-fluent": "train",
    "emoji-fluent-held-out": "validation",
}
"""The part of the emoji that each packaged data set holds."""
PACKAGED = packaged_names(_PARTS)
# Their names in ImageFolder, open_clip, webdataset and common data sets of the Hub.
IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "txt")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and its captions.

    Attributes:
        file: file of the image.
        captions: at least one, none blank.
        key: pictures with equal keys are always in the same part.
    """

    file: ImageFile
    captions: tuple[str, ...]
    key: str


def load_pictures(
    dataset: str,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> list[Picture]:
    """Load the pictures of a data set, each with all its captions.

    Args:
        dataset: a folder of images with a .txt file of the same name next to each, one caption a line; webdataset
            shards, such as ``shards/*.tar``; one of :data:`PACKAGED`; or what `datasets` reads: a table, a folder, also
            with ImageFolder's metadata.jsonl, or a Hub name.
        split: split of a Hub data set, or of a folder that `datasets` reads.
        image_column: column of images, or of paths, absolute or relative to the table's folder; None takes the first of
            :data:`IMAGE_COLUMNS` that exists, or else the first column of images.
        caption_column: column of texts or lists of texts; None takes the first of :data:`CAPTION_COLUMNS` that exists.
        config_name: configuration of a Hub data set.
        revision: revision of a Hub data set.

    Raises:
        MisconfigurationException: there is no such file, folder, column or package; an image is missing, or no image
            has a caption.
    """
    if is_packaged(dataset):
        return _packaged(dataset)
    if has_texts(dataset):
        return _of_folder(Path(dataset).expanduser(), split)
    if dataset.lower().endswith(".tar"):
        with read_errors(dataset, "train", PACKAGED):
            shards = sorted(glob.glob(str(Path(dataset).expanduser())))
            if not shards:
                raise FileNotFoundError("there is no such file")
            table = datasets.load_dataset("webdataset", data_files=shards, split="train")
    else:
        table = read_table(dataset, split, PACKAGED, config_name, revision)
    return _of_table(dataset, table, image_column, caption_column)


def has_texts(dataset: str) -> bool:
    """Return whether a data set is a folder of images with .txt files next to them."""
    images = image_files(Path(dataset).expanduser())
    return any(image.with_suffix(".txt").is_file() for image in images)


# -- tables, shards and folders


def _of_table(
    name: str, table: Any, image_column: str | None = None, caption_column: str | None = None
) -> list[Picture]:
    """Load the pictures of a table with images in it, or with paths."""
    image, caption = _columns(name, table, image_column, caption_column)
    say_what_is_left_out(f"dataset={name!r}", table.column_names, (image, caption))
    path = Path(name).expanduser()
    folder = path if path.is_dir() else path.parent
    images = table.select_columns(image)
    if isinstance(table.features[image], datasets.Image):  # opened only when their batch is made
        images = images.cast_column(image, datasets.Image(decode=False))
    rows: list[Row] = []
    for number, captions in enumerate(table[caption]):
        value = images[number][image]
        file: ImageFile | None = None
        key = ""
        if isinstance(value, dict) and value["bytes"]:
            file = Embedded(f"{name}, row {number}", partial(_bytes, images, number, image))
            # By its content: a data set may hold an image in several rows, one for each caption.
            key = hashlib.sha256(value["bytes"]).hexdigest()
        else:
            written = value["path"] if isinstance(value, dict) else value
            if isinstance(written, str) and written.strip():
                file = folder / Path(written.strip()).expanduser()
                # In one spelling, since an image under two names would count as two.
                key = os.path.relpath(file, folder)
        # From shards, whose texts are files with a caption on each line.
        rows.append((file, key, captions.split("\n") if caption == "txt" and captions else captions))
    return _gathered(name, rows)


def _bytes(images: Any, number: int, column: str) -> bytes:
    return bytes(images[number][column]["bytes"])


def _of_folder(folder: Path, split: str) -> list[Picture]:
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.lower() in PART_OF_FOLDER)
    if parts or split != "train":
        inside = f", but has the folders {', '.join(parts)}" if parts else ""
        raise MisconfigurationException(
            f"{folder} is a folder of images with texts, which has no split {split!r}{inside}: give one folder as "
            "dataset and others as validation_dataset and test_dataset"
        )
    rows: list[Row] = []
    for image in image_files(folder):
        text = image.with_suffix(".txt")
        rows.append((image, str(image.relative_to(folder)), read_lines(text) if text.is_file() else []))
    return _gathered(str(folder), rows)


def _columns(name: str, table: Any, image: str | None, caption: str | None) -> tuple[str, str]:
    """Return the names of the columns of images and captions."""
    of_images = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    candidates = {
        "image_column": [image] if image else [*IMAGE_COLUMNS, *of_images],
        "caption_column": [caption] if caption else CAPTION_COLUMNS,
    }
    found = []
    for argument, names in candidates.items():
        there = [column for column in names if column in table.column_names]
        if not there:
            raise MisconfigurationException(
                f"{name} has the columns {table.column_names}, but not {argument}, one of {', '.join(names)}: name the "
                "columns of the images and their captions (a table needs a first line with the columns' names; a "
                "folder of images needs a .txt file next to each, or a metadata.jsonl)"
            )
        found.append(there[0])
    return found[0], found[1]


def _gathered(source: str, rows: Sequence[Row]) -> list[Picture]:
    """Return the pictures of rows; several rows may belong to one image."""
    files: dict[str, ImageFile] = {}
    captions: dict[str, list[str]] = {}
    faults = []
    for number, (file, key, said) in enumerate(rows, 1):
        texts = [str(text).strip() for text in (said if isinstance(said, list) else [said]) if text is not None]
        texts = [text for text in texts if text]
        if file is None or not texts:
            faults.append(f"{file} has no caption" if file else f"row {number} has no image")
            continue
        files.setdefault(key, file)
        captions.setdefault(key, []).extend(texts)
    warn_of_left_out(f"dataset={source!r}", faults, len(rows))
    missing = [f"there is no {file}" for file in files.values() if isinstance(file, Path) and not file.is_file()]
    if missing:
        raise MisconfigurationException(f"dataset={source!r}: {few(missing, '; ')}. Correct or remove these rows")
    return [Picture(files[key], tuple(texts), key) for key, texts in captions.items()]


# -- packages


def _packaged(dataset: str) -> list[Picture]:
    """Load emoji with the captions that the small CLIP is trained on; an emoji is in the same part in every style."""
    part = packaged_task(dataset, _PARTS)
    folders = emoji.prepare()
    table = str(folders.pairs if part == "train" else folders.held_out_pairs)
    # A file's name is the emoji's code points, in every style.
    pairs = [replace(pair, key=Path(pair.key).stem) for pair in _of_table(table, read_table(table, "train"))]
    if "fluent" not in dataset:
        return pairs
    captions = {pair.key: pair.captions for pair in pairs}
    images = sorted((folders.target / part).rglob("*.png"))
    # Captions come from the other styles' tables, and some emoji are drawn only in this style.
    return [Picture(image, captions[image.stem], image.stem) for image in images if image.stem in captions]
