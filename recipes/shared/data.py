"""Data sets that ``datasets`` reads, the part that a row belongs to, and batches in as many pieces as ranks need."""

import glob
import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.shared.files import not_utf8
from recipes.shared.table_files import (
    FORMATS,
    csv_options,
    files_of_csv_folder,
    is_of_empty_file,
    refuse_other_encodings,
    refuse_other_forms,
    refuse_rows_by_key,
    table_ending,
    with_dates_as_texts,
)

PACKAGED = "packaged:"  # how the names of packaged tasks begin
VALIDATION_SHARE = 0.05
"""Of the training split, where nothing else says what validation takes."""
_OWN_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What data sets call the split for a part."""
_CODE = Path(__file__).parents[2]  # of the recipes and the package
Task = TypeVar("Task")


def read_table(
    name: str, split: str, tasks: str = "", config_name: str | None = None, revision: str | None = None
) -> Any:
    """A local file or a Hub data set, as a ``datasets.Dataset``.

    Args:
        name: a Hub name, a local folder of the same layout, or a local .json, .jsonl, .parquet or .csv file, which may
            be compressed, as .jsonl.gz is.
        split: to read from a Hub data set. A file has no splits: "train" is all of it, and another one has to be in
            its name.
        tasks: names of the packaged ones, for the message; "" where there are none.
        config_name: which of a Hub data set's configurations, such as "mrpc" of GLUE; None where it has one.
        revision: of a Hub data set, such as "refs/convert/parquet" where the main one is a script.

    Raises:
        MisconfigurationException: it can't be read.
    """
    path = Path(name).expanduser()
    ending = table_ending(name)
    with _read_errors(name, split, tasks):
        if ending is not None:
            if not path.is_file():
                raise MisconfigurationException(f"dataset={name!r}: there is no such file")
            refuse_split_of_file(name, split)
            if ending == ".json":
                refuse_rows_by_key(name, path)
            files = glob.escape(str(path))
            options = csv_options(files) if ending == ".csv" else {}
            load = partial(datasets.load_dataset, FORMATS[ending], data_files=files, split="train", **options)
            return _with_texts_as_written(load)
        name = _folder_or_hub(name)
        csv_files = files_of_csv_folder(name, config_name, split) if path.is_dir() else None
        if csv_files:
            parts = {split.partition("[")[0]: csv_files}
            return datasets.load_dataset("csv", data_files=parts, split=split, **csv_options(csv_files))
        load = partial(datasets.load_dataset, name, config_name, split=split, revision=revision)
        return _with_texts_as_written(load)


def _with_texts_as_written(load: Callable[..., Any]) -> Any:
    """The table that ``load`` reads, with all texts of JSON files as they are there."""
    table = load()
    if table.info.builder_name != "json":
        return table
    refuse_other_encodings(table)
    return with_dates_as_texts(table, load)


def _folder_or_hub(name: str) -> str:
    """What `datasets` takes for a data set that is no file.

    Raises:
        MisconfigurationException: it is a form that is not read.
    """
    path = Path(name).expanduser()
    refuse_other_forms(name, path)
    # A name on the Hub has no ending without an owner, no two slashes, and begins with none of these.
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if not path.exists() and (is_path or ("/" not in name and path.suffix)):
        raise MisconfigurationException(f"dataset={name!r}: there is no such file or folder")
    if not path.is_dir():
        return name
    if glob.has_magic(str(path)):
        raise MisconfigurationException(
            f"dataset={name!r}: `datasets` takes *, ? and [ in a folder's name for a pattern, and finds nothing: "
            "rename the folder, or give a file"
        )
    return str(path)


@contextmanager
def _read_errors(name: str, split: str, tasks: str) -> Iterator[None]:
    """Say of whatever `datasets` raises which data set can't be read, and what to give."""
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:  # a dozen types, from a bad name to a network down or broken JSON
        if table_ending(name) is not None and is_of_empty_file(error):
            raise MisconfigurationException(f"dataset={name!r} is empty") from error
        if "'utf-8' codec" in _reason(error) or "Invalid UTF8" in _reason(error):
            raise MisconfigurationException(not_utf8(f"dataset={name!r}")) from error
        formats = ", ".join(FORMATS)
        raise MisconfigurationException(
            f"dataset={name!r}, split={split!r} can't be read: {_reason(error)}. Give a Hub name, "
            + (f"a file ending in {formats}, or one of {tasks}" if tasks else f"or a file ending in {formats}")
        ) from error


class PartedData(Protocol):
    """A data module whose validation and test are splits or files, or else shares of the training split.

    Attributes:
        dataset: its name.
        config_name: which of a Hub data set's configurations.
        revision: of it.
        split: to train on.
        validation_share: as given; None takes the data set's own split, or :data:`VALIDATION_SHARE` without one.
        test_share: as given; None takes the data set's own split, or nothing without one.
        own_splits: of each part the split or file; None where it takes a share.
        shares: of each part the share.
    """

    dataset: str | None
    config_name: str | None
    revision: str | None
    split: str
    validation_share: float | None
    test_share: float | None
    own_splits: dict[str, str | None]
    shares: dict[str, float]


def shares_of(data: PartedData) -> dict[str, float]:
    """The share of the training split that each part takes, as far as it is known before the data are looked at."""
    validation = VALIDATION_SHARE if data.validation_share is None else data.validation_share
    shares = {"validation": validation, "test": data.test_share or 0.0}
    for part in shares:
        if data.own_splits[part] is not None:
            shares[part] = 0.0  # the whole training split trains, except for the other part's share
    return shares


def take_own_splits(data: PartedData, tasks: str = "", stage: str = "") -> None:
    """Make a data set's own splits the parts for which no split and no share was given.

    Args:
        data: the data module, whose ``own_splits`` and ``shares`` change.
        tasks: names of the packaged data sets, for the message.
        stage: that is set up; "test" needs a part to test on.

    Raises:
        MisconfigurationException: no data set was given, it can't be read, or there is nothing to test on.
    """
    name = given_dataset(data.dataset, tasks)
    unset = []
    for part, share in (("validation", data.validation_share), ("test", data.test_share)):
        if share is None and data.own_splits[part] is None:
            unset.append(part)
    trained_on = re.findall(r"\w+", data.split)  # perhaps one beside "train"
    names = [split for split in _split_names(data, name, tasks) if split not in trained_on] if unset else []
    for part in unset:
        own = next((split for split in _OWN_SPLITS[part] if split in names), None)
        if own is not None:
            rank_zero_info(f"dataset={name!r}: its split {own!r} is taken; a {part}_share would take its place")
            data.own_splits[part] = own
            data.shares[part] = 0.0
    if stage == "test" and data.own_splits["test"] is None and not data.shares["test"]:
        raise MisconfigurationException(
            "there is nothing to test on: no test split was given or found, and no share was held out. Give "
            "--data.test_split, a split or a file that was not trained on, or train with --data.test_share 0.1, say. "
            "`validate` judges on the validation part"
        )


def _split_names(data: PartedData, name: str, tasks: str) -> list[str]:
    """The splits of a data set; of files with "{split}" in their name those that are there."""
    if is_packaged(name):
        return []
    if is_file(name):
        splits = [*_OWN_SPLITS["validation"], *_OWN_SPLITS["test"]] if "{split}" in name else []
        return [split for split in splits if Path(name.replace("{split}", split)).expanduser().is_file()]
    with _read_errors(name, data.split, tasks):
        found = datasets.get_dataset_split_names(_folder_or_hub(name), data.config_name, revision=data.revision)
    return list(found)


def given_dataset(name: str | None, tasks: str = "") -> str:
    """The name of a data set.

    Raises:
        MisconfigurationException: there is none.
    """
    if name is None:
        packaged = f", or one of {tasks}" if tasks else ""
        raise MisconfigurationException(
            f"no data: give a file ending in {', '.join(FORMATS)}, a folder or a Hub name as --data.dataset{packaged}"
        )
    return name


def mapped(table: Any, function: Callable[..., dict[str, Any]], **options: Any) -> Any:
    """``table.map(function)``, whose kept result is one of the code as it is now.

    `datasets` keeps what a function has made of a file, and finds it again by the function's name and arguments. After
    an update it would give back what the code of the day before has made.

    Args:
        table: a ``datasets.Dataset``.
        function: of a row, or of what the options say.
        options: further ones of ``map``.
    """
    return table.map(_OfCode(function, _code()), **options)


@dataclass(frozen=True)
class _OfCode:
    """A function with a name for the code that it is a part of, by both of which `datasets` finds a result."""

    function: Callable[..., dict[str, Any]]
    code: str

    def __call__(self, *given: Any) -> dict[str, Any]:
        return self.function(*given)


@cache
def _code() -> str:
    """A name for the code of the recipes and the package, which is another one after each change."""
    digest = hashlib.sha256()
    for folder in ("recipes", "lightning_flatlora"):
        for file in sorted((_CODE / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def say_what_is_left_out(source: str, columns: Iterable[str], used: Iterable[str]) -> None:
    """Print the columns of a table that nobody reads, one of which may be what its user thought was read.

    Args:
        source: where the table is from.
        columns: of the table.
        used: those that are read.
    """
    used = set(used)
    left_out = [column for column in columns if column not in used]
    if left_out:
        rank_zero_info(f"{source}: read are {', '.join(sorted(used))}; left out are {', '.join(left_out)}")


def with_known_names(table: Any, known: Iterable[str]) -> Any:
    """A table in which columns have their known names that differ from them in case or in spaces around them alone.

    Args:
        table: a ``datasets.Dataset``.
        known: names of columns that are looked for.

    Example:
        >>> table = datasets.Dataset.from_dict({"Question": ["Why?"], " answer": ["So."], "id": [0]})
        >>> with_known_names(table, ["question", "answer"]).column_names
        ['question', 'answer', 'id']
    """
    present = set(table.column_names)
    by_form = {name.lower(): name for name in known}
    names: dict[str, str] = {}
    for column in table.column_names:
        name = by_form.get(column.strip().lower())
        if name is not None and name not in present:
            names[column] = name
            present.add(name)
    return table.rename_columns(names) if names else table


def _reason(error: BaseException) -> str:
    """What an error says, with that of the one behind it: "an error occurred" alone helps nobody."""
    reason = f"{type(error).__name__}: {error}"
    return reason if error.__cause__ is None else f"{reason} ({_reason(error.__cause__)})"


def is_packaged(name: str) -> bool:
    """Whether a data set's name is one of a packaged task."""
    return name.startswith(PACKAGED)


def packaged_names(tasks: Iterable[str]) -> str:
    """Packaged tasks by the names of data sets, for messages.

    Example:
        >>> packaged_names(["sentiment", "spam"])
        'packaged:sentiment, packaged:spam'
    """
    return ", ".join(PACKAGED + task for task in tasks)


def packaged_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """What belongs to a packaged task.

    Args:
        name: of a data set that :func:`is_packaged`.
        tasks: by name, without what names of data sets begin with.

    Raises:
        MisconfigurationException: there is no such task.
    """
    task = name.removeprefix(PACKAGED)
    if task not in tasks:
        raise MisconfigurationException(f"dataset: unknown packaged task {task!r}, give one of {packaged_names(tasks)}")
    return tasks[task]


def split_problems(name: str | None, splits: Iterable[str | None]) -> list[str]:
    """What is wrong with the splits of a data set that is a file: it has none, and would be read as a whole.

    A model would be tested on what it was trained on. A data module asks when it is made, so that nobody learns of it
    after the training.

    Args:
        name: of the data set; "{split}" in it stands for the split.
        splits: names of splits, or files; None takes a share.

    Returns:
        A message for each split that a file does not have.

    Example:
        >>> len(split_problems("mine.json", ["test", "held_out.json", None]))
        1
        >>> split_problems("nyu-mll/glue", ["test"])
        []
    """
    problems: list[str] = []
    if name is None or not is_file(name) or "{split}" in name:
        return problems
    for split in splits:
        if split in (None, "train") or is_file(split) or is_of_split(Path(name), split):
            continue
        problems.append(
            f"dataset={name!r} is a file, and has no split {split!r}: give another file as test_split or "
            "validation_split, or null"
        )
    return problems


def is_file(name: str) -> bool:
    """Whether a name is that of a table's file, or of the text file that one recipe reads; it need not be there."""
    return table_ending(name) is not None or Path(name).suffix.lower() == ".txt"


def refuse_split_of_file(name: str, split: str) -> None:
    """Raise what :func:`split_problems` finds."""
    problems = split_problems(name, [split])
    if problems:
        raise MisconfigurationException(problems[0])


def refuse_training_data(data: object, name: str, training: str, own_splits: Iterable[str | None]) -> None:
    """Refuse parts for which the data would be read on which a model is trained; to be asked before a training.

    Args:
        data: the data module.
        name: of the data set; "{split}" in it stands for the split.
        training: the split that is trained on.
        own_splits: those of validation and test, or files; None takes a share, which is held out. Of slices such as
            "train[:10%]" only equal ones are found; :func:`warn_of_training_data` finds the others.

    Raises:
        MisconfigurationException: a part is read from where training is.

    Example:
        >>> refuse_training_data(object(), "mine.csv", "train", ["held_out.csv", None])
    """
    problems = []
    for split in own_splits:
        if split is not None and place_of(name, split) == place_of(name, training):
            problems.append(
                f"{split!r} is read from where the training data are: give another split or file as validation_split "
                "or test_split, or null, which holds out a share"
            )
    refuse_bad_settings(data, {}, more=problems)


def warn_of_training_data(part: str, keys: Collection[Hashable], trained: Collection[Hashable], what: str) -> None:
    """Warn where a part repeats what is trained on, as a copied file and an overlapping slice do.

    A warning and not an error, since many public data sets repeat a few of their texts.

    Args:
        part: its name, or what it is read from.
        keys: of its rows: equal keys are the same to a model.
        trained: the keys of the training data.
        what: the keys stand for, in the plural.

    Example:
        >>> warn_of_training_data("validation", ["a"], ["b"], "texts")
    """
    known = set(trained)
    repeated = sum(key in known for key in keys)
    if repeated:
        rank_zero_warn(
            f"{part}: {repeated} of {len(keys)} {what} are in the training split too, so that this part measures "
            "partly what was learnt by heart"
        )


def place_of(name: str, split: str) -> Path | tuple[str, str]:
    """Where a split of a data set is read from: equal for what is the same, however it is written."""
    if is_file(split):
        return Path(split).expanduser().resolve()
    if is_file(name):
        return Path(name.replace("{split}", split)).expanduser().resolve()
    return name, split


def is_of_split(file: Path, split: str) -> bool:
    """Whether a file's name, or that of a folder that it is in, says that it holds a split.

    Example:
        >>> is_of_split(Path("data/questions_val.json"), "val"), is_of_split(Path("data/questions.json"), "val")
        (True, False)
        >>> is_of_split(Path("data/latest.json"), "test"), is_of_split(Path("data/test-2024.json"), "test")
        (False, True)
        >>> is_of_split(Path("data/mine_test_a.json"), "test_a")
        True
        >>> is_of_split(Path("data/dev.json"), "./data/dev.json")
        True
    """
    # Between other letters it is a part of a word: "latest" is no test, and v2_OpenEnded_val2014 is val.
    is_named = re.search(rf"(?<![^\W\d_]){re.escape(split)}(?![^\W\d_])", file.name) is not None
    return is_named or split in file.parts or Path(split).expanduser() == file.expanduser()


def part_of(key: str, shares: dict[str, float]) -> str:
    """The part that a key falls into: the same on every machine, whatever else is in the data.

    Example:
        >>> part_of("what is a cat", {"validation": 0.15, "test": 0.25})
        'train'
    """
    # A number in [0, 1) that the text alone decides; Python's own hash of a text differs from process to process.
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return "train"


def remedy_of_empty(part: str, shares: Mapping[str, float]) -> str:
    """What to do where nothing falls into a part, as the end of a message; "" where the part is no share.

    Example:
        >>> remedy_of_empty("validation", {"validation": 0.15})[:68]
        '. It takes a share of 0.15, and what is equal stays together: give m'
    """
    if not shares.get(part):
        return ""
    return (
        f". It takes a share of {shares[part]:g}, and what is equal stays together: give more rows, a larger "
        f"{part}_share, or a {part}_split"
    )


def divided(batches: list[list[int]], number: int) -> list[list[int]]:
    """As many batches as asked for, or as can be, with the same examples in the same order: the last long are halved.

    Example:
        >>> divided([[1, 2], [3, 4], [5]], 5)
        [[1], [2], [3], [4], [5]]
    """
    batches = list(batches)
    while len(batches) < number:
        place = max(range(len(batches)), key=lambda i: (len(batches[i]), i))
        halves = batches[place][: len(batches[place]) // 2], batches[place][len(batches[place]) // 2 :]
        # A single example can't be halved: then there are fewer batches than ranks, and some are given twice.
        if not halves[0]:
            break
        batches[place : place + 1] = halves
    return batches


def columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a table that is given in rows.

    Example:
        >>> columns([{"line": 0, "prompt": "Why?"}, {"line": 1, "prompt": "How?"}], ["prompt"])
        {'prompt': ['Why?', 'How?']}
    """
    table = {}
    for name in names:
        table[name] = [row[name] for row in rows]
    return table


def refuse_bad_settings(
    data: object, least: Mapping[str, int], shares: Mapping[str, float] | None = None, more: Sequence[str] = ()
) -> None:
    """Check a data module's settings.

    Args:
        data: holds them.
        least: the smallest values of integers, by name.
        shares: of validation and test, which have to leave something to train on.
        more: problems that have been found elsewhere.

    Raises:
        MisconfigurationException: with all problems.
    """
    problems = []
    for name, smallest in least.items():
        value = getattr(data, name)
        if value < smallest:
            problems.append(f"{name} must be an integer >= {smallest}, got {value!r}")
    if shares and (min(shares.values()) < 0 or sum(shares.values()) >= 1):
        problems.append(
            "validation_share and test_share must be >= 0 and leave something to train on, "
            f"got {shares['validation']!r} and {shares['test']!r}"
        )
    problems += more
    if problems:
        raise MisconfigurationException(f"{type(data).__name__}: " + "; ".join(problems))
