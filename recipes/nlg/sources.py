"""Where meanings and their texts come from: any table that ``datasets`` reads, and LoRA's text files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.files import read_lines
from recipes.data.left_out import warn_of_left_out
from recipes.data.reading import read_table

LAYOUTS = (
    ("meaning_representation", "human_reference"),  # tuetschek/e2e_nlg
    ("mr", "ref"),  # E2E's own CSV files
    ("context", "completion"),  # LoRA's repository
    ("document", "summary"),  # XSum
    ("article", "highlights"),  # CNN/DailyMail
    ("source", "target"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Columns of a meaning and of its text that are found without being named."""
_SEPARATOR = "||"


def read_pairs(table: Any, source: str, meaning: str | None = None, text: str | None = None) -> list[dict[str, str]]:
    """Return the pairs of a table, in its order, each with ``meaning`` and ``text``.

    Args:
        table: table with a column of meanings, and one of texts or of lists of texts.
        source: name of the table in errors.
        meaning: column of the meanings; None finds one of :data:`LAYOUTS`.
        text: column of the texts; None likewise.

    Raises:
        MisconfigurationException: a column is missing or holds something other than texts, or no row has both.
    """
    meaning_column, text_column = _columns(table.column_names, source, meaning, text)
    pairs, faults = [], []
    for number, row in enumerate(table):
        where = f"{source}: row {number}"
        said = _filled([row[meaning_column]], where)
        texts = _filled(row[text_column], where)
        if not (said and texts):
            faults.append(f"row {number} has no text in {text_column if said else meaning_column!r}")
        else:
            pairs += [{"meaning": said[0], "text": one} for one in texts]
    warn_of_left_out(source, faults, len(table))
    return pairs


def _filled(value: Any, where: str) -> list[str]:
    """Return a text, or the texts of a list, without empty ones."""
    texts = []
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not isinstance(one, str):
            raise MisconfigurationException(f"{where} needs a text, but holds {one!r}")
        texts.append((one or "").strip())
    return [one for one in texts if one]


def read_source(name: str, split: str, config_name: str | None = None, revision: str | None = None) -> Any:
    """Return a Hub data set's split or a file as a table.

    Args:
        name: a Hub name, a local folder of the same layout, a .json, .jsonl, .parquet or .csv file, or a .txt file with
            ``meaning||text`` on each line.
        split: split of a Hub data set.
        config_name: configuration of a Hub data set.
        revision: revision of a Hub data set, such as "refs/convert/parquet" if the main one is a script.

    Raises:
        MisconfigurationException: it can't be read, or a line lacks the separator.
    """
    if Path(name).suffix.lower() != ".txt":
        return read_table(name, split, config_name=config_name, revision=revision)
    rows = []
    for number, line in enumerate(read_lines(name), start=1):
        context, separator, completion = line.partition(_SEPARATOR)
        if separator:
            rows.append({"context": context, "completion": completion})
        elif line.strip():
            raise MisconfigurationException(f"dataset={name!r}, line {number} is not meaning{_SEPARATOR}text: {line!r}")
    if not rows:
        raise MisconfigurationException(f"dataset={name!r} has no rows")
    return datasets.Dataset.from_list(rows)


def grouped(pairs: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return each meaning once, numbered in the order of the first pair, with the texts of all its pairs.

    Example:
        >>> pairs = [("a", "one"), ("b", "two"), ("a", "three")]
        >>> grouped({"meaning": meaning, "text": text} for meaning, text in pairs)[0]
        {'number': 0, 'meaning': 'a', 'references': ['one', 'three']}
    """
    texts: dict[str, list[str]] = {}
    for pair in pairs:
        texts.setdefault(pair["meaning"], []).append(pair["text"])
    rows = []
    for number, (meaning, references) in enumerate(texts.items()):
        rows.append({"number": number, "meaning": meaning, "references": references})
    return rows


def _columns(names: Sequence[str], source: str, meaning: str | None, text: str | None) -> tuple[str, str]:
    for layout in LAYOUTS:
        found = meaning or layout[0], text or layout[1]
        if set(found) <= set(names):
            return found
    known = ", ".join(f"{one} and {other}" for one, other in LAYOUTS)
    raise MisconfigurationException(
        f"{source} has the columns {sorted(names)}, but data.meaning={meaning!r}, data.text={text!r}: set both to "
        f"columns that it has. null finds {known}"
    )
