"""Data sets that ``datasets`` reads, and batches in as many pieces as ranks need."""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import fsspec
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import CsvConfig
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.data.left_out import few

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_WORDS_STAY: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""Options for CSV files: words such as NA and None stay texts, and only an empty value is missing."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that `datasets` unpacks by itself
PACKAGED = "packaged:"  # the names of packaged tasks begin with it
_RECIPES = Path(__file__).parents[1]
Task = TypeVar("Task")


def read_table(
    name: str, split: str, tasks: str = "", config_name: str | None = None, revision: str | None = None
) -> Any:
    """Read a local file, a folder or a Hub data set with ``datasets``.

    Args:
        name: a Hub name, a local folder of the same layout, or a local .json, .jsonl, .parquet, .csv or .tsv file,
            which may be compressed, as .jsonl.gz is.
        split: split of a folder or a Hub data set; a file is read as a whole.
        tasks: names of the packaged tasks, for the message; "" if there are none.
        config_name: configuration of a Hub data set, such as "mrpc" of GLUE; None if it has only one.
        revision: revision of a Hub data set, such as "refs/convert/parquet" if the main one is a script.

    Raises:
        MisconfigurationException: it can't be read.
    """
    with read_errors(name, split, tasks):
        table = _read(name, split, config_name, revision)
    if not len(table):
        raise MisconfigurationException(f"dataset={name!r}, split={split!r} has no rows")
    return table


def table_ending(name: str) -> str | None:
    """Return the ending of a table's file, one of :data:`FORMATS`; None if the name is not that of such a file.

    Example:
        >>> table_ending("mine/questions.json"), table_ending("Reviews.CSV.gz"), table_ending("nyu-mll/glue")
        ('.json', '.csv', None)
    """
    endings = [ending.lower() for ending in Path(name).suffixes]
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FORMATS else None


def _read(name: str, split: str, config_name: str | None, revision: str | None) -> Any:
    path = Path(name).expanduser()
    ending = table_ending(name)
    if ending is None:
        name, options = _folder_or_hub(name), {}
        if path.is_dir():
            builder = datasets.load_dataset_builder(name, config_name)
            options = _WORDS_STAY if isinstance(builder.config, CsvConfig) else {}
            _say_which_are_read(path, builder.config.data_files or {})
        table = datasets.load_dataset(name, config_name, split=split, revision=revision, **options)
    else:
        if not path.is_file() or not path.stat().st_size:
            raise MisconfigurationException(f"dataset={name!r}: there is no such file, or it is empty")
        options = _csv_options(path) if FORMATS[ending] == "csv" else {}
        table = datasets.load_dataset(FORMATS[ending], data_files=glob.escape(str(path)), split="train", **options)
    if "__index_level_0__" in table.column_names:  # pandas took the first value for the row's name
        raise ValueError("the first row has more values than the header has names: put texts with commas into quotes")
    return table


def _say_which_are_read(folder: Path, data_files: Mapping[str, Sequence[str]]) -> None:
    """Print a folder's files by split, and warn of tables that belong to none, which `datasets` leaves out."""
    read: set[Path] = set()
    for part, files in data_files.items():
        read.update(Path(file).resolve() for file in files)
        rank_zero_info(f"dataset={str(folder)!r}: {part} is {few([Path(file).name for file in files])}")
    # A card says itself which files belong to each of its configurations.
    paths = [] if (folder / "README.md").exists() else sorted(folder.rglob("*"))
    tables = [path for path in paths if table_ending(path.name)]
    unread = [path.name for path in tables if path.resolve() not in read]
    if unread:
        rank_zero_warn(f"dataset={str(folder)!r}: {few(unread)} are not read, being in no split or of another format")


def _csv_options(file: Path) -> dict[str, Any]:
    """Return options of ``datasets.load_dataset`` for a CSV file: its separator, and words such as NA as texts.

    Args:
        file: a file in UTF-8, perhaps compressed. A tab in its first line separates columns, as in open_clip's tables.
    """
    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8") as lines:
        separator = "\t" if "\t" in lines.readline() else ","
    return {"sep": separator, **_WORDS_STAY}


def _folder_or_hub(name: str) -> str:
    """Return the name by which `datasets` reads a folder or a Hub data set.

    Raises:
        MisconfigurationException: the name is a path, but not that of a folder.
    """
    path = Path(name).expanduser()
    if path.is_file() or (name.startswith((".", "/", "~")) and not path.is_dir()):
        raise MisconfigurationException(
            f"dataset={name!r} is neither a folder nor a file that ends in {', '.join(FORMATS)}"
        )
    return str(path) if path.is_dir() else name


@contextmanager
def read_errors(name: str, split: str, tasks: str) -> Iterator[None]:
    """Turn any error of `datasets` into one that says which data set can't be read, and what to give."""
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:  # a dozen types, from a bad name to a missing network or broken JSON
        raise MisconfigurationException(
            f"dataset={name!r}, split={split!r} can't be read: {_reason(error).rstrip('.')}. Give {_choice(tasks)}"
        ) from error


def split_names(name: str, split: str, config_name: str | None, revision: str | None, tasks: str) -> list[str]:
    """Return the splits of a folder or a Hub data set; the arguments are those of :func:`read_table`."""
    with read_errors(name, split, tasks):
        found = datasets.get_dataset_split_names(_folder_or_hub(name), config_name, revision=revision)
    return list(found)


def given_dataset(name: str | None, tasks: str = "") -> str:
    """Return the name of a data set, which must be given.

    Raises:
        MisconfigurationException: it is None.
    """
    if name is None:
        raise MisconfigurationException(f"no data: give {_choice(tasks)} as --data.dataset")
    return name


def _choice(tasks: str) -> str:
    packaged = f", or one of {tasks}" if tasks else ""
    return f"a file ending in {', '.join(FORMATS)}, a folder, a Hub name{packaged}"


def mapped(table: Any, function: Callable[..., dict[str, Any]], **options: Any) -> Any:
    """Return ``table.map(function)``, whose cached result is one of the current code.

    `datasets` caches what a function has made of a file by the function's name and arguments. After an update it would
    return the old code's result.

    Args:
        table: a ``datasets.Dataset``.
        function: takes a row, or whatever the options say.
        options: further options of ``map``.
    """
    return table.map(partial(_call, function, _code()), **options)


def _call(function: Callable[..., dict[str, Any]], code: str, *given: Any) -> dict[str, Any]:
    """Call a function of the recipes; ``code``, which names their version, only makes `datasets` keep results apart."""
    return function(*given)


@cache
def _code() -> str:
    """Return a name for the code of the recipes, which differs after each change."""
    return str(Hasher.hash([file.read_bytes() for file in sorted(_RECIPES.rglob("*.py"))]))


def say_what_is_left_out(source: str, columns: Iterable[str], used: Iterable[str]) -> None:
    """Print the unused columns of a table, since its user may think that they are read.

    Args:
        source: source of the table.
        columns: columns of the table.
        used: columns that are read.
    """
    used = set(used)
    left_out = [column for column in columns if column not in used]
    if left_out:
        rank_zero_info(f"{source}: columns read: {', '.join(sorted(used))}; left out: {', '.join(left_out)}")


def renamed(table: Any, names: Mapping[str, str]) -> Any:
    """Return a table with other names for some of its columns; other columns of these names are replaced.

    Args:
        table: a ``datasets.Dataset``.
        names: the table's own names of columns, each with the recipe's.

    Raises:
        MisconfigurationException: a column is missing, or two columns get the same name.
    """
    replaced = [name for name in names.values() if name in table.column_names and name not in names]
    try:
        return table.remove_columns(replaced).rename_columns(dict(names))
    except ValueError as error:
        raise MisconfigurationException(
            f"columns={dict(names)} does not fit the table, whose columns are {table.column_names}: {error}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return an error's message and that of its cause, since "an error occurred" helps nobody."""
    reason = f"{type(error).__name__}: {error}"
    return reason if error.__cause__ is None else f"{reason} ({_reason(error.__cause__)})"


def is_packaged(name: str) -> bool:
    """Return whether a data set's name is that of a packaged task."""
    return name.startswith(PACKAGED)


def packaged_names(tasks: Iterable[str]) -> str:
    """Return the names of packaged tasks as data sets, for messages.

    Example:
        >>> packaged_names(["sentiment", "subject"])
        'packaged:sentiment, packaged:subject'
    """
    return ", ".join(PACKAGED + task for task in tasks)


def packaged_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """Return the entry of a packaged task.

    Args:
        name: name of a data set that :func:`is_packaged`.
        tasks: entries by name, without the prefix "packaged:".

    Raises:
        MisconfigurationException: there is no such task.
    """
    task = name.removeprefix(PACKAGED)
    if task not in tasks:
        raise MisconfigurationException(f"dataset: unknown packaged task {task!r}, give one of {packaged_names(tasks)}")
    return tasks[task]


def divided(batches: list[list[int]], number: int) -> list[list[int]]:
    """Return as many batches as asked for, or as possible, of the same examples in order: long batches are halved.

    Example:
        >>> divided([[1, 2], [3, 4], [5]], 5)
        [[1], [2], [3], [4], [5]]
    """
    batches = list(batches)
    while len(batches) < number:
        longest = max(range(len(batches)), key=lambda i: (len(batches[i]), i))
        halves = batches[longest][: len(batches[longest]) // 2], batches[longest][len(batches[longest]) // 2 :]
        # A single example can't be halved: then there are fewer batches than ranks, and some are given twice.
        if not halves[0]:
            break
        batches[longest : longest + 1] = halves
    return batches


def columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of a table that is given in rows.

    Example:
        >>> columns([{"line": 0, "prompt": "Why?"}, {"line": 1, "prompt": "How?"}], ["prompt"])
        {'prompt': ['Why?', 'How?']}
    """
    table = {}
    for name in names:
        table[name] = [row[name] for row in rows]
    return table
