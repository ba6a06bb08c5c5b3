"""The forms of files that tables come in: which are read, which are not, and what `datasets` would change of them."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
from lightning.pytorch.utilities.exceptions import MisconfigurationException

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that `datasets` unpacks by itself
_ROWS_BY_KEY = re.compile(r'\s*\{\s*"[^"]*"\s*:\s*\{')


def table_ending(name: str) -> str | None:
    """The ending of a table's file, one of :data:`FORMATS`; None where a name is not one of such a file.

    Example:
        >>> table_ending("mine/questions.json"), table_ending("Reviews.CSV.gz"), table_ending("nyu-mll/glue")
        ('.json', '.csv', None)
    """
    endings = [ending.lower() for ending in Path(name).suffixes]
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FORMATS else None


def refuse_other_forms(name: str, path: Path) -> None:
    """Say of a file or folder that is there, but in a form that is not read, how to get one that is."""
    if path.is_file():
        raise MisconfigurationException(
            f"dataset={name!r}: of tables, files that end in {', '.join(FORMATS)} are read. pandas and `datasets` "
            "write them, for example by to_parquet"
        )
    if (path / "state.json").is_file():
        raise MisconfigurationException(
            f"dataset={name!r} was written by save_to_disk of `datasets`, which load_from_disk alone can read: write "
            "it by to_parquet"
        )


def refuse_rows_by_key(name: str, path: Path) -> None:
    """Refuse a JSON object that holds rows by their ids, of which `datasets` would slowly make a column each."""
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig") as file:
        if not _ROWS_BY_KEY.match(file.read(1000)):
            return
        file.seek(0)
        try:
            content = json.load(file)
        except ValueError:  # lines of JSON
            return
    if len(content) > 1 and all(isinstance(row, dict) for row in content.values()):
        raise MisconfigurationException(
            f"dataset={name!r} holds {len(content)} objects by key, such as {next(iter(content))!r}, and no list of "
            "rows: write the objects as a list, or one a line"
        )


def is_of_csv_files(folder: Path) -> bool:
    """Whether a folder's tables are CSV files alone, and no card declares how to read them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    endings = {table_ending(path.name) for path in files} - {None}
    return endings == {".csv"} and not (folder / "README.md").exists()


def with_dates_as_texts(table: Any, path: Path) -> Any:
    """A table of a JSON file in which what looks like a date is the text that the file holds.

    `datasets` makes a time of it, whose text is another one.
    """
    features = _with_texts_for_times(table.features)
    if features == table.features:
        return table
    # With the time of the file's last change, since `datasets` keeps what it has once read under these arguments.
    given = {"path": str(path), "changed": path.stat().st_mtime_ns}
    return datasets.Dataset.from_generator(_json_rows, gen_kwargs=given, features=features, split="train")


def _with_texts_for_times(feature: Any) -> Any:
    if isinstance(feature, dict):
        changed = {name: _with_texts_for_times(inner) for name, inner in feature.items()}
        return type(feature)(changed)
    if isinstance(feature, list):  # as older releases of `datasets` write them
        return [_with_texts_for_times(inner) for inner in feature]
    if hasattr(feature, "feature"):
        changed_list = copy.copy(feature)
        changed_list.feature = _with_texts_for_times(feature.feature)
        return changed_list
    is_time = isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time"))
    return datasets.Value("string") if is_time else feature


def _json_rows(path: str, changed: int) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, or of one that holds a list of them."""
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)
