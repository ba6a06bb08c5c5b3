"""Images and their captions from a table, a folder, webdataset shards, or a package."""

import csv
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

from braceexpand import braceexpand
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from recipes.clip import emoji
from recipes.clip.images import image_endings, image_files
from recipes.shared.data import is_packaged
from recipes.shared.ranks import rank

PACKAGED = ("packaged:emoji", "packaged:emoji-held-out", "packaged:emoji-fluent", "packaged:emoji-fluent-held-out")
_TABLES = {".csv": ",", ".tsv": "\t"}
_CAPTION_FILES = ("captions.csv", "captions.tsv")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file inside an uncompressed archive; Pillow opens it as it opens a path.

    Attributes:
        archive: where it lies.
        name: inside the archive.
        offset: of its first byte, in bytes.
        size: in bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """The whole file."""
        with self.archive.open("rb") as archive:
            archive.seek(self.offset)
            return archive.read(self.size)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and what is said of it.

    Attributes:
        file: of the image.
        captions: at least one, none blank.
        key: pictures with the same key never part between training and evaluation.
    """

    file: Path | StoredFile
    captions: tuple[str, ...]
    key: str


def load(dataset: str, image_column: str = "image", caption_column: str = "caption") -> list[Picture]:
    """The pictures of a data set, each with all its captions.

    Args:
        dataset: a .csv or .tsv file; a folder of images with a .txt file of the same name beside each, one caption a
            line, or with a captions.csv or .tsv; webdataset shards, such as ``shards/*.tar`` or
            ``{train,more}/{000..009}.tar``; or one of :data:`PACKAGED`.
        image_column: of a table: paths, relative to the table's folder, or absolute.
        caption_column: of a table.

    Raises:
        MisconfigurationException: there is no such file, folder, column or package; a caption or an image is missing.
    """
    if is_packaged(dataset):
        pictures = _packaged(dataset)
    elif dataset.lower().endswith(".tar"):
        pictures = _shards(dataset)
    else:
        pictures = _local(dataset, image_column, caption_column)
    if not pictures:
        raise MisconfigurationException(f"dataset={dataset!r} holds no image with a caption")
    return pictures


def _local(dataset: str, image_column: str, caption_column: str) -> list[Picture]:
    path = Path(dataset).expanduser()
    if path.is_dir():
        tables = [path / name for name in _CAPTION_FILES if (path / name).is_file()]
        return _table(tables[0], image_column, caption_column) if tables else _folder(path)
    if path.suffix.lower() not in _TABLES:
        raise MisconfigurationException(
            f"dataset={dataset!r} is not a folder, nor does it end in .csv, .tsv or .tar, nor is it one of "
            f"{', '.join(PACKAGED)}"
        )
    if not path.is_file():
        raise MisconfigurationException(f"dataset={dataset!r}: there is no such file")
    return _table(path, image_column, caption_column)


# -- tables and folders


def _table(path: Path, image_column: str, caption_column: str) -> list[Picture]:
    captions: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    is_of_tabs = _TABLES[path.suffix.lower()] == "\t"
    faults = []
    try:
        # Tables from Excel begin with a byte order mark, which would be part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=_TABLES[path.suffix.lower()], strict=True)
            _check_columns(path, rows.fieldnames or (), image_column, caption_column)
            for row in rows:
                if None in row:
                    # A caption with commas has to stand in quotes, or its end would be lost.
                    faults.append(f"line {rows.line_num} has more columns than the first line")
                    continue
                image, caption = (row[image_column] or "").strip(), (row[caption_column] or "").strip()
                if is_of_tabs and "\t" in caption and "\n" in caption:
                    # Whole lines, each with an image, would be lost in it.
                    faults.append(
                        f"line {rows.line_num} ends a caption that began lines before it with a quotation mark (a "
                        'caption such as "Stop" says the sign has to be written """Stop"" says the sign")'
                    )
                    continue
                if image and caption:
                    place = path.parent / Path(image).expanduser()
                    # However it is written, since an image under two names would be two.
                    key = os.path.relpath(place, path.parent)
                    files.setdefault(key, place)
                    captions.setdefault(key, []).append(caption)
                else:
                    empty = caption_column if image else image_column
                    faults.append(f"line {rows.line_num} has an empty {empty!r}")
    except (csv.Error, UnicodeDecodeError) as error:
        line = f" (near line {rows.line_num})" if isinstance(error, csv.Error) else ""
        raise MisconfigurationException(f"{path} can't be read as a table in UTF-8: {error}{line}") from error
    _refuse(path, faults)
    _refuse(path, [f"there is no {file}" for file in files.values() if not file.is_file()])
    return [Picture(files[key], tuple(texts), key) for key, texts in captions.items()]


def _check_columns(path: Path, header: Iterable[str], image_column: str, caption_column: str) -> None:
    columns = {"image_column": image_column, "caption_column": caption_column}
    missing = [f"{argument}={name!r}" for argument, name in columns.items() if name not in header]
    if missing:
        raise MisconfigurationException(
            f"{path} has the columns {list(header)}, but not {' nor '.join(missing)}: name the columns that hold the "
            "image's path and its caption (a table needs a first line with the columns' names, separated by commas)"
        )


def _folder(folder: Path) -> list[Picture]:
    images = image_files(folder)
    if not images:
        raise MisconfigurationException(f"{folder} holds no file with an image's ending, such as .jpg or .png")
    captions: dict[Path, tuple[str, ...]] = {}
    faults = []
    for image in images:
        text = image.with_suffix(".txt")
        try:
            captions[image] = lines_of(text.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            faults.append(
                f"{image.name} has neither a {text.name} beside it nor is there a {' or '.join(_CAPTION_FILES)}"
            )
        except UnicodeDecodeError as error:
            faults.append(f"{text} is not UTF-8: {error}")
        else:
            if not captions[image]:
                faults.append(f"{text} is empty")
    _refuse(folder, faults)
    return [Picture(image, captions[image], str(image.relative_to(folder))) for image in images]


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a text that are not blank.

    Example:
        >>> lines_of("a cat\\n\\n on a mat ")
        ('a cat', 'on a mat')
    """
    # Not splitlines(), which also splits at rare characters that may stand within a caption, such as U+2028.
    return tuple(line.strip() for line in io.StringIO(text, newline=None) if line.strip())


def _refuse(path: Path | str, faults: list[str]) -> None:
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise MisconfigurationException(f"{path}: {'; '.join(faults[:5])}{more}. Mend or remove them")


# -- webdataset


def _shards(pattern: str) -> list[Picture]:
    """Pictures of webdataset shards, found in one pass over the archives' headers."""
    shards: list[Path] = []
    for one in _expanded(pattern):
        path = Path(one).expanduser()
        # A folder may have brackets in its own name.
        files = sorted(glob(str(path))) or sorted(glob(f"{escape(str(path.parent))}/{path.name}"))
        shards += map(Path, files or [one])
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise MisconfigurationException(f"dataset={pattern!r}: there is no {', '.join(missing[:5])}")
    pictures, faults = [], []
    for shard in tqdm(shards, "Reading shards", disable=len(shards) < 10 or rank() != 0):
        images, captions, wrong = _members(shard)
        faults += [f"{shard}: {fault}" for fault in wrong]
        faults += [f"{shard}: {key} has no .txt" for key in sorted(images.keys() - captions)]
        faults += [f"{shard}: {key} has a .txt, but no image" for key in sorted(captions.keys() - images)]
        faults += [f"{shard}: {key}.txt is empty" for key, texts in captions.items() if not texts]
        pictures += [Picture(image, captions.get(key, ()), f"{shard.name}/{key}") for key, image in images.items()]
    _refuse(pattern, faults)
    return pictures


def _members(shard: Path) -> tuple[dict[str, StoredFile], dict[str, tuple[str, ...]], list[str]]:
    """Images and captions of a shard by key, and what is wrong with its names.

    The key is webdataset's, the name up to the first dot in its last part. Of "1.png", "1.txt" and "1.mask.png" the
    last one is no image of the pair.
    """
    images: dict[str, StoredFile] = {}
    captions: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    others: list[tuple[str, str]] = []
    endings = image_endings()
    try:
        # Uncompressed archives alone: images are read from where they lie in the file.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if name.startswith("."):  # what macOS adds, such as "._1.png"
                    continue
                base, _, suffix = name.partition(".")
                key = f"{folder}/{base}" if folder else base
                if f".{suffix.lower()}" in endings:
                    faults += [f"there is a second image {member.name}"] if key in images else []
                    images[key] = StoredFile(shard, member.name, member.offset_data, member.size)
                elif suffix.lower() == "txt":
                    faults += [f"there is a second text {member.name}"] if key in captions else []
                    file = archive.extractfile(member)
                    if file is not None:  # a folder may have such a name too
                        captions[key] = lines_of(file.read().decode("utf-8-sig"))
                elif Path(name).suffix.lower() in endings:
                    others.append((member.name, key))
            names = archive.getnames()
            if names and not _ends_here(archive, shard):
                faults.append(f"there is no end of an archive after {names[-1]}: it has been cut off")
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"{shard} can't be read as an uncompressed .tar with texts in UTF-8: {error}"
        ) from error
    faults += [f"the key of {name} ends at the first dot, {key}" for name, key in others if key not in images]
    return images, captions, faults


def _ends_here(archive: tarfile.TarFile, shard: Path) -> bool:
    """Whether the block after the last member is the zeros that end an archive.

    Where it is anything else, the shard was cut off or damaged there, which tarfile takes for the end without a word.
    """
    with shard.open("rb") as file:
        file.seek(archive.offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def _expanded(pattern: str) -> list[str]:
    """The patterns that braces stand for, as in webdataset; one with a lone brace in a name stays as it is.

    Example:
        >>> _expanded("{old,new}/{09..10}.tar")
        ['old/09.tar', 'old/10.tar', 'new/09.tar', 'new/10.tar']
        >>> _expanded("{old/1.tar")
        ['{old/1.tar']
    """
    try:
        # A backslash stands in paths of Windows, and escapes nothing.
        return list(braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced braces
        return [pattern]


# -- packages


def fetch(dataset: str) -> None:
    """Install what a packaged data set needs, on one process, before the others look for it."""
    if is_packaged(dataset):
        load(dataset)


def _packaged(dataset: str) -> list[Picture]:
    """Emoji with the captions that the small CLIP is trained on; an emoji is in the same part in every style."""
    if dataset not in PACKAGED:
        raise MisconfigurationException(f"dataset: unknown package {dataset!r}, give one of {', '.join(PACKAGED)}")
    folders, held_out = emoji.prepare(), dataset.endswith("held-out")
    pairs = _table(folders.held_out_pairs if held_out else folders.pairs, "image", "caption")
    codes = [Path(picture.key).stem for picture in pairs]  # the file's name is the emoji's code points, in every style
    if "fluent" not in dataset:
        return [Picture(picture.file, picture.captions, code) for picture, code in zip(pairs, codes, strict=True)]
    captions = {code: picture.captions for picture, code in zip(pairs, codes, strict=True)}
    images = sorted((folders.target / ("validation" if held_out else "train")).rglob("*.png"))
    # Captions come from the other styles' tables, and some emoji are drawn in this style alone.
    return [Picture(image, captions[image.stem], image.stem) for image in images if image.stem in captions]
