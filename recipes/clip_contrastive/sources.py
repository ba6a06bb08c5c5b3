"""Images and their captions from whatever `datasets` reads, a folder with texts, or a package."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from braceexpand import braceexpand
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip import emoji
from recipes.clip.images import Embedded, ImageFile, image_files, shortened
from recipes.shared.data import is_packaged, packaged_names, read_errors, read_table, say_what_is_left_out
from recipes.shared.files import read_lines
from recipes.shared.left_out import few, warn_of_left_out

Row = tuple[ImageFile | None, str, Any]
"""An image, its key, and what is said of it."""
_STYLES = ("emoji", "emoji-held-out", "emoji-fluent", "emoji-fluent-held-out")
PACKAGED = packaged_names(_STYLES)
_CAPTION_FILES = ("captions.csv", "captions.tsv")
# The names that ImageFolder, open_clip and common data sets of the Hub have for them.
IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path")
CAPTION_COLUMNS = ("caption", "title", "text", "captions")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and what is said of it.

    Attributes:
        file: of the image.
        captions: at least one, none blank.
        key: pictures with the same key never part between training and evaluation.
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
        dataset: a folder of images with a .txt file of the same name next to each, one caption a line, or with a
            captions.csv or .tsv; webdataset shards, such as ``shards/*.tar`` or ``{train,more}/{000..009}.tar``; one of
            :data:`PACKAGED`; or what `datasets` reads: a table, a folder, also with ImageFolder's metadata.jsonl, or a
            Hub name.
        split: of a folder or a Hub data set.
        image_column: images, or their paths, relative to the table's folder, or absolute; None takes the first of
            :data:`IMAGE_COLUMNS` that is there.
        caption_column: a text, or a list of them; None takes the first of :data:`CAPTION_COLUMNS`.
        config_name: which of a Hub data set's configurations.
        revision: of a Hub data set.

    Raises:
        MisconfigurationException: there is no such file, folder, column or package; an image is missing, or no image
            has a caption.
    """
    if is_packaged(dataset):
        return _packaged(dataset)
    if dataset.lower().endswith(".tar"):
        return _of_shards(dataset)
    if _has_texts(dataset):
        return _of_folder(Path(dataset).expanduser())
    return _of_table(dataset, split, (image_column, caption_column), config_name, revision)


def has_splits(dataset: str) -> bool:
    """Return whether a data set may come in splits, as folders that `datasets` reads and Hub data sets do."""
    return _caption_file(dataset) is None and not _has_texts(dataset)


def _caption_file(dataset: str) -> str | None:
    """Return the table of captions in a folder, if there is one."""
    files = [Path(dataset).expanduser() / name for name in _CAPTION_FILES]
    return next((str(file) for file in files if file.is_file()), None)


def _has_texts(dataset: str) -> bool:
    """Return whether a data set is a folder of images with .txt files next to them."""
    images = [] if _caption_file(dataset) else image_files(Path(dataset).expanduser())
    return any(image.with_suffix(".txt").is_file() for image in images)


# -- tables, shards and folders


def _of_table(
    name: str,
    split: str = "train",
    given: Sequence[str | None] = (None, None),
    config_name: str | None = None,
    revision: str | None = None,
) -> list[Picture]:
    """Load the pictures of a table with images in it, or with paths."""
    name = _caption_file(name) or name
    table = read_table(name, split, PACKAGED, config_name, revision)
    image, caption = _columns(name, table.column_names, given)
    say_what_is_left_out(f"dataset={name!r}", table.column_names, (image, caption))
    path = Path(name).expanduser()
    folder = path if path.is_dir() else path.parent
    images = _undecoded(table, image)
    rows: list[Row] = []
    for number, captions in enumerate(table[caption]):
        value = images[number][image]
        if isinstance(value, dict) and value["bytes"]:
            file = Embedded(f"{name}, row {number}", partial(_bytes, images, number, image))
            # By its content: a data set may hold an image in several rows, one for each caption.
            rows.append((file, hashlib.sha256(value["bytes"]).hexdigest(), captions))
        else:
            rows.append((*_in_folder(value["path"] if isinstance(value, dict) else value, folder), captions))
    return _gathered(name, rows)


def _of_shards(pattern: str) -> list[Picture]:
    # A backslash stands in paths of Windows, and escapes nothing.
    shards = list(braceexpand(str(Path(pattern).expanduser()), escape=False))
    with read_errors(pattern, "train", PACKAGED):
        table = datasets.load_dataset("webdataset", data_files=shards, split="train")
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns or "txt" not in table.column_names:
        raise MisconfigurationException(
            f"dataset={pattern!r} has the columns {table.column_names}: it needs images, and a .txt next to each"
        )
    images = _undecoded(table, columns[0])
    rows: list[Row] = []
    for number, row in enumerate(table.select_columns(["__key__", "__url__", "txt"])):
        key = f"{Path(row['__url__']).name}/{row['__key__']}"
        has_image = images[number][columns[0]] is not None
        file = Embedded(f"{key}.{columns[0]}", partial(_bytes, images, number, columns[0])) if has_image else None
        rows.append((file, key, (row["txt"] or "").split("\n")))
    return _gathered(pattern, rows)


def _undecoded(table: Any, column: str) -> Any:
    """Return a table's column of images, which are opened only when their batch is made."""
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return table.select_columns(column)


def _bytes(images: Any, number: int, column: str) -> bytes:
    return bytes(images[number][column]["bytes"])


def _of_folder(folder: Path) -> list[Picture]:
    rows: list[Row] = []
    for image in image_files(folder):
        text = image.with_suffix(".txt")
        rows.append((image, str(image.relative_to(folder)), read_lines(text) if text.is_file() else []))
    return _gathered(str(folder), rows)


def _columns(source: str, columns: Sequence[str], given: Sequence[str | None]) -> tuple[str, str]:
    """Return the names of the columns of images and captions."""
    found, missing = [], []
    wanted = zip(("image_column", "caption_column"), given, (IMAGE_COLUMNS, CAPTION_COLUMNS), strict=True)
    for argument, name, usual in wanted:
        there = [one for one in ([name] if name else usual) if one in columns]
        found += there[:1]
        if not there:
            missing.append(f"{argument}={name!r}" if name else f"{argument}, one of {', '.join(usual)}")
    if missing:
        raise MisconfigurationException(
            f"{source} has the columns {list(columns)}, but not {' nor '.join(missing)}: name those of the images and "
            "their captions (a table needs a first line with the columns' names; a folder of images needs a "
            ".txt next to each, a captions.csv, or a metadata.jsonl)"
        )
    return found[0], found[1]


def _in_folder(name: Any, folder: Path) -> tuple[Path | None, str]:
    """Return an image's file, and its path relative to the folder of its table."""
    if not isinstance(name, str) or not name.strip():
        return None, ""
    path = folder / Path(name.strip()).expanduser()
    # However it is written, since an image under two names would be two.
    return path, os.path.relpath(path, folder)


def _gathered(source: str, rows: Sequence[Row]) -> list[Picture]:
    """Return the pictures of rows, of which several may be of one image."""
    files: dict[str, ImageFile] = {}
    captions: dict[str, list[str]] = {}
    faults = []
    for number, (file, key, said) in enumerate(rows, 1):
        texts = [str(text).strip() for text in (said if isinstance(said, list) else [said]) if text is not None]
        texts = [text for text in texts if text]
        if file is None or not texts:
            faults.append(f"{shortened(str(file))} has no caption" if file else f"row {number} has no image")
            continue
        files.setdefault(key, file)
        captions.setdefault(key, []).extend(texts)
    warn_of_left_out(f"dataset={source!r}", faults, len(rows))
    missing = [f"there is no {file}" for file in files.values() if isinstance(file, Path) and not file.is_file()]
    if missing:
        raise MisconfigurationException(f"dataset={source!r}: {few(missing, '; ')}. Correct or remove these rows")
    return [Picture(files[key], tuple(texts), key) for key, texts in captions.items()]


# -- packages


def fetch(dataset: str) -> None:
    """Install what a packaged data set needs, on one process, before the others look for it."""
    if is_packaged(dataset):
        load_pictures(dataset)


def _packaged(dataset: str) -> list[Picture]:
    """Emoji with the captions that the small CLIP is trained on; an emoji is in the same part in every style."""
    if dataset not in PACKAGED.split(", "):
        raise MisconfigurationException(f"dataset: unknown package {dataset!r}, give one of {PACKAGED}")
    folders, held_out = emoji.prepare(), dataset.endswith("held-out")
    table = folders.held_out_pairs if held_out else folders.pairs
    # A file's name is the emoji's code points, in every style.
    pairs = [replace(one, key=Path(one.key).stem) for one in _of_table(str(table))]
    if "fluent" not in dataset:
        return pairs
    captions = {pair.key: pair.captions for pair in pairs}
    images = sorted((folders.target / ("validation" if held_out else "train")).rglob("*.png"))
    # Captions come from the other styles' tables, and some emoji are drawn in this style alone.
    return [Picture(image, captions[image.stem], image.stem) for image in images if image.stem in captions]
