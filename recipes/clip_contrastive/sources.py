"""Images and their captions from whatever `datasets` reads, a table, a folder, webdataset shards, or a package."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip import emoji
from recipes.clip.images import Embedded, ImageFile, image_files
from recipes.clip_contrastive.pictures import Picture, lines_of, refuse
from recipes.clip_contrastive.shards import pictures_of_shards
from recipes.shared.data import is_packaged, packaged_names, read_table, say_what_is_left_out
from recipes.shared.left_out import warn_of_left_out
from recipes.shared.table_files import refuse_other_separators

Row = tuple[ImageFile | None, str, Any]
"""An image, its key, and what is said of it."""
_STYLES = ("emoji", "emoji-held-out", "emoji-fluent", "emoji-fluent-held-out")
PACKAGED = packaged_names(_STYLES)
_TEXT_TABLES = (".csv", ".tsv")
_CAPTION_FILES = ("captions.csv", "captions.tsv")
# The names that ImageFolder, open_clip and common data sets of the Hub have for them.
IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path")
CAPTION_COLUMNS = ("caption", "title", "text", "captions")


def load(
    dataset: str,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> list[Picture]:
    """The pictures of a data set, each with all its captions.

    Args:
        dataset: a .csv or .tsv file; a folder of images with a .txt file of the same name beside each, one caption a
            line, or with a captions.csv or .tsv; webdataset shards, such as ``shards/*.tar`` or
            ``{train,more}/{000..009}.tar``; one of :data:`PACKAGED`; or what `datasets` reads: a .parquet, .json or
            .jsonl file, a folder, also with ImageFolder's metadata.jsonl, or a Hub name.
        split: of what `datasets` reads.
        image_column: images, or their paths, relative to the table's folder, or absolute; None takes the first of
            :data:`IMAGE_COLUMNS` that is there.
        caption_column: a text, or a list of them; None takes the first of :data:`CAPTION_COLUMNS`.
        config_name: which of a Hub data set's configurations.
        revision: of a Hub data set.

    Raises:
        MisconfigurationException: there is no such file, folder, column or package; a caption or an image is missing.
    """
    path, columns = Path(dataset).expanduser(), (image_column, caption_column)
    if is_packaged(dataset):
        pictures = _packaged(dataset)
    elif dataset.lower().endswith(".tar"):
        pictures = pictures_of_shards(dataset)
    elif is_of_datasets(dataset):
        table = read_table(dataset, split, PACKAGED, config_name, revision)
        pictures = _of_datasets(dataset, table, path if path.is_dir() else path.parent, columns)
    elif path.is_dir():
        tables = [path / name for name in _CAPTION_FILES if (path / name).is_file()]
        pictures = _of_text_table(tables[0], columns) if tables else _of_folder(path)
    else:
        pictures = _of_text_table(path, columns)
    if not pictures:
        raise MisconfigurationException(f"dataset={dataset!r} holds no image with a caption")
    faults = [f"the text of {picture.file} is empty" for picture in pictures if not picture.captions]
    warn_of_left_out(f"dataset={dataset!r}", faults, len(pictures))
    return [picture for picture in pictures if picture.captions]


def is_of_datasets(dataset: str) -> bool:
    """Whether `datasets` reads it: not texts in tables and folders, whose faults would be passed over in silence."""
    path = Path(dataset).expanduser()
    if is_packaged(dataset) or path.suffix.lower() in (*_TEXT_TABLES, ".tar"):
        return False
    has_captions = any((path / name).is_file() for name in _CAPTION_FILES)
    return not has_captions and not any(image.with_suffix(".txt").is_file() for image in image_files(path))


# -- tables and folders


def _of_datasets(name: str, table: Any, folder: Path, given: Sequence[str | None]) -> list[Picture]:
    """Of a table with images in it, or with paths."""
    image, caption = _columns(name, table.column_names, given)
    say_what_is_left_out(f"dataset={name!r}", table.column_names, (image, caption))
    if isinstance(table.features[image], datasets.Image):
        # Not decoded: an image is opened when its batch is made.
        table = table.cast_column(image, datasets.Image(decode=False))
    images = table.select_columns(image)
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


def _bytes(images: Any, number: int, column: str) -> bytes:
    return bytes(images[number][column]["bytes"])


def _of_text_table(path: Path, given: Sequence[str | None]) -> list[Picture]:
    if not path.is_file():
        raise MisconfigurationException(f"dataset={str(path)!r}: there is no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # open_clip separates by tabs in .csv files, too.
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        refuse_other_separators(list(table.columns))
    except (ValueError, OSError) as error:  # also of pandas' own, and of bytes that are no UTF-8
        raise MisconfigurationException(f"{path} can't be read as a table in UTF-8: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):
        # A caption with commas has to stand in quotes, or its end would be lost.
        raise MisconfigurationException(f"{path}: the first row has more columns than the header")
    image, caption = _columns(str(path), list(table.columns), given)
    if separator == "\t":
        texts = table[caption].fillna("").str
        swallowed = table.index[texts.contains("\t", regex=False) & texts.contains("\n", regex=False)]
        # Whole lines, each with an image, would be lost in such a caption.
        reason = 'goes on over further lines: a quotation mark at its beginning has to be written as """'
        refuse(path, [f"row {number + 1} has a caption that {reason}" for number in swallowed])
    rows = [(*_in_folder(value, path.parent), text) for value, text in zip(table[image], table[caption], strict=True)]
    return _gathered(str(path), rows)


def _columns(source: str, columns: Sequence[str], given: Sequence[str | None]) -> tuple[str, str]:
    """The columns of images and captions."""
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
    """An image's file, and its place in the folder of its table."""
    if not isinstance(name, str) or not name.strip():
        return None, ""
    place = folder / Path(name.strip()).expanduser()
    # However it is written, since an image under two names would be two.
    return place, os.path.relpath(place, folder)


def _gathered(source: str, rows: Sequence[Row]) -> list[Picture]:
    """Pictures of rows, of which several may be of one image."""
    files: dict[str, ImageFile] = {}
    captions: dict[str, list[str]] = {}
    faults = []
    for number, (file, key, said) in enumerate(rows, 1):
        texts = [str(text).strip() for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
        texts = [text for text in texts if text]
        if file is None or not texts:
            faults.append(f"row {number} has no {'caption' if file else 'image'}")
            continue
        files.setdefault(key, file)
        captions.setdefault(key, []).extend(texts)
    warn_of_left_out(source, faults, len(rows))
    refuse(source, [f"there is no {file}" for file in files.values() if isinstance(file, Path) and not file.is_file()])
    return [Picture(files[key], tuple(texts), key) for key, texts in captions.items()]


def _of_folder(folder: Path) -> list[Picture]:
    captions: dict[Path, tuple[str, ...]] = {}
    faults = []
    for image in image_files(folder):
        text = image.with_suffix(".txt")
        try:
            captions[image] = lines_of(text.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            faults.append(f"{image.name} has no {text.name} next to it")
        except UnicodeDecodeError as error:
            faults.append(f"{text} is not UTF-8: {error}")
    refuse(folder, faults)
    return [Picture(image, texts, str(image.relative_to(folder))) for image, texts in captions.items()]


# -- packages


def fetch(dataset: str) -> None:
    """Install what a packaged data set needs, on one process, before the others look for it."""
    if is_packaged(dataset):
        load(dataset)


def _packaged(dataset: str) -> list[Picture]:
    """Emoji with the captions that the small CLIP is trained on; an emoji is in the same part in every style."""
    if dataset not in PACKAGED.split(", "):
        raise MisconfigurationException(f"dataset: unknown package {dataset!r}, give one of {PACKAGED}")
    folders, held_out = emoji.prepare(), dataset.endswith("held-out")
    table = folders.held_out_pairs if held_out else folders.pairs
    # A file's name is the emoji's code points, in every style.
    pairs = [replace(one, key=Path(one.key).stem) for one in _of_text_table(table, (None, None))]
    if "fluent" not in dataset:
        return pairs
    captions = {pair.key: pair.captions for pair in pairs}
    images = sorted((folders.target / ("validation" if held_out else "train")).rglob("*.png"))
    # Captions come from the other styles' tables, and some emoji are drawn in this style alone.
    return [Picture(image, captions[image.stem], image.stem) for image in images if image.stem in captions]
