"""The forms of files that tables come in: which are read, which are not, and what `datasets` would change of them."""

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import FILES_TO_IGNORE
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from recipes.shared.left_out import few

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that `datasets` unpacks by itself
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_TIME = re.compile(r"\b(timestamp|date32|date64|time32|time64)\[")


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
    if path.is_file() and path.suffix:  # without an ending it may be a data set of the Hub that is meant
        raise MisconfigurationException(
            f"dataset={name!r}: of tables, files that end in {', '.join(FORMATS)} are read. pandas and `datasets` "
            "write them, for example by to_parquet"
        )
    if (path / "state.json").is_file():
        raise MisconfigurationException(
            f"dataset={name!r} was written by save_to_disk of `datasets`, which only load_from_disk can read: write "
            "it by to_parquet"
        )


def refuse_rows_by_key(name: str, table: Any) -> None:
    """Refuse a JSON object that holds rows by their ids, or columns by their names, which are read as one row.

    Raises:
        MisconfigurationException: the table has one row, of objects with the same keys.
    """
    columns = list(table.features.values())
    if len(table) == 1 and len(columns) > 1 and isinstance(columns[0], dict) and columns[1:] == columns[:-1]:
        raise MisconfigurationException(
            f"dataset={name!r} holds {len(columns)} objects by key, such as {table.column_names[0]!r}, and no list of "
            "rows: write the rows as a list, or one a line (with pandas, to_json(orient='records'))"
        )


def refuse_other_encodings(table: Any) -> None:
    """Refuse texts of JSON files that are not in UTF-8, which `datasets` takes in as they are.

    Raises:
        pyarrow.ArrowInvalid: there are some.
    """
    table.data.table.validate(full=True)


def is_of_empty_file(error: Exception) -> bool:
    """Say whether an error of ``datasets.load_dataset`` says that a file has no row.

    Example:
        >>> is_of_empty_file(StopIteration()), is_of_empty_file(ValueError("a column is missing"))
        (True, False)
    """
    # Of a JSON file without a byte, of a CSV file with a header alone, and of a Parquet file without a row.
    text = f"{error} {error.__cause__}"
    return isinstance(error, StopIteration) or "corresponds to no data" in text or "BatchSize must be" in text


def csv_options(files: str | list[str], cache_dir: str | None = None) -> dict[str, Any]:
    """Give options of ``datasets.load_dataset`` by which a CSV file's values stay the texts that they are.

    pandas, which reads the file, would make 3.5 of the answer "3.50" and 7 of the class "007". It would judge a column
    by its first 10,000 rows, and take the words None, NA, null and nan for nothing.

    Args:
        files: the file, or several of the same columns, as ``data_files`` takes them.
        cache_dir: of `datasets`; None is its own.

    Raises:
        ValueError: the first row has more values than the header has names, or other marks than commas separate the
            columns.
    """
    first_row = datasets.load_dataset("csv", data_files=files, split="train", cache_dir=cache_dir, nrows=1)
    names = first_row.column_names
    named = [name for name in names if name != "__index_level_0__"]
    refuse_other_separators(named)
    if len(named) < len(names):  # pandas has taken the first value for the row's name
        raise ValueError(
            "the first row has more values than the header has names, and a text with a comma in it needs quotation "
            "marks around it"
        )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def refuse_other_separators(columns: list[str]) -> None:
    """Refuse a CSV file whose columns something else than a comma separates.

    Args:
        columns: their names, which are one with all others in it then.

    Raises:
        ValueError: it is one.
    """
    for mark, name in _SEPARATORS.items():
        if len(columns) == 1 and mark in columns[0]:
            raise ValueError(f"its columns are separated by {name}: save it with commas")


def warn_of_unread_tables(folder: Path, builder: Any) -> None:
    """Name the tables in a folder that belong to no split, and which `datasets` leaves out without a word.

    Args:
        folder: a data set.
        builder: of `datasets` for its default configuration.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return  # the card decides what is read
    read = {Path(file).resolve() for file in chain.from_iterable((builder.config.data_files or {}).values())}
    unread = []
    for file in sorted(folder.rglob("*.*")):
        name = file.relative_to(folder)
        # Such as .cache and __MACOSX, and dataset_info.json, which `datasets` passes over as well.
        is_hidden = any(part.startswith((".", "__")) for part in name.parts) or file.name in FILES_TO_IGNORE
        if table_ending(file.name) and not is_hidden and file.resolve() not in read:
            unread.append(str(name))
    if unread:
        rank_zero_warn(
            f"dataset={str(folder)!r}: not read are {few(unread)}, which belong to no split. Name all files after "
            "their splits, as train-1.jsonl and train-2.jsonl, or none, and give them one format"
        )


def files_of_csv_folder(builder: Any, split: str) -> list[str] | None:
    """The CSV files that hold a split of a local folder; None where it is another kind, or a card says what they hold.

    Args:
        builder: of `datasets` for the folder.
        split: to read, perhaps a slice such as "train[:10%]".
    """
    if not type(builder).__module__.endswith("csv.csv") or builder.info.features is not None:
        return None
    files = builder.config.data_files or {}
    return files.get(split.partition("[")[0])


def with_dates_as_texts(table: Any, load: Callable[..., Any]) -> Any:
    """A table of JSON files in which what looks like a date is the text that they hold.

    `datasets` makes a time of it, whose text is another one.

    Args:
        table: as `datasets` has read it.
        load: reads it again, with the ``features`` that it is given.
    """
    features = dict(table.features)
    for column in table.features.arrow_schema:
        # Of the column itself, or of what it holds.
        if _TIME.search(str(column.type)):
            features[column.name] = datasets.Json()
    return table if features == dict(table.features) else load(features=datasets.Features(features))
