"""Where meanings and their texts come from: any table that ``datasets`` reads, and LoRA's text files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.data import read_table
from recipes.shared.files import read_lines
from recipes.shared.left_out import warn_of_left_out

LAYOUTS = (
    ("meaning_representation", "human_reference"),  # tuetschek/e2e_nlg
    ("meaning_representation", "target"),  # GEM/e2e_nlg
    ("mr", "ref"),  # E2E's own CSV files
    ("context", "completion"),  # LoRA's repository
    ("document", "summary"),  # XSum
    ("article", "highlights"),  # CNN/DailyMail
    ("source", "target"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Columns of a meaning and of its text that are found by themselves."""
_REFERENCES = "references"  # GEM's list of all texts of a meaning, in its splits for evaluation
_SEPARATOR = "||"


class Pair(NamedTuple):
    """A meaning, a text that says it, and GEM's other texts of the meaning, to compare a written text with."""

    meaning: str
    text: str
    references: tuple[str, ...] = ()


def read_pairs(table: Any, source: str, meaning: str | None = None, text: str | None = None) -> list[Pair]:
    """The pairs of a table, in its order.

    Args:
        table: with a column of meanings, and one of texts or of lists of texts.
        source: what an error calls it.
        meaning: column of the meanings; None finds one of :data:`LAYOUTS`.
        text: column of the texts; None likewise.

    Raises:
        MisconfigurationException: a column is missing, holds something else than texts, or no row has both.
    """
    meaning_column, text_column = _columns(table.column_names, source, meaning, text)
    pairs, faults = [], []
    for number, row in enumerate(table):
        value = row[text_column]
        # In GEM's training splits they are empty texts.
        found = (row.get(_REFERENCES) or []) if text is None else []
        references = tuple(one.strip() for one in found if one and one.strip())
        # An empty list is a meaning without a text, as None is.
        texts = value if isinstance(value, list) and value else [value]
        for given in [row[meaning_column], *texts]:
            if given not in (None, []) and not isinstance(given, str):
                raise MisconfigurationException(
                    f"{source}: row {number} needs a text in {meaning_column!r} and in {text_column!r}, "
                    f"and holds {given!r}"
                )
        said, *texts = [(one or "").strip() for one in (row[meaning_column], *texts)]
        if not said or not any(texts):
            faults.append(f"row {number} has no text in {text_column if said else meaning_column!r}")
        pairs += [Pair(said, one, references) for one in texts if said and one]
    warn_of_left_out(source, faults, len(table))
    return pairs


def in_full(rows: Any) -> list[dict[str, str]]:
    """Rows with one for each text that a meaning is compared with: GEM's references in place of a row's own text."""
    full, meanings_in_full = [], set()
    for row in rows:
        if not row["references"]:
            full.append({"meaning": row["meaning"], "text": row["text"]})
        # Each row of a meaning may hold all of them.
        elif row["meaning"] not in meanings_in_full:
            meanings_in_full.add(row["meaning"])
            full += [{"meaning": row["meaning"], "text": text} for text in row["references"]]
    return full


def read_source(name: str, split: str, config_name: str | None = None, revision: str | None = None) -> Any:
    """A Hub data set's split or a file, as a table.

    Args:
        name: a Hub name, a local folder of the same layout, a .json, .jsonl, .parquet or .csv file, or a .txt file with
            ``meaning||text`` in each line.
        split: of a Hub data set.
        config_name: which of its configurations.
        revision: of it, such as "refs/convert/parquet" where the main one is a script.

    Raises:
        MisconfigurationException: it can't be read.
    """
    if Path(name).suffix.lower() != ".txt":
        return read_table(name, split, config_name=config_name, revision=revision)
    return _text_table(name)


def grouped(pairs: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Each meaning once, numbered in the order of the first pair, with the texts of all its pairs.

    Example:
        >>> pairs = [("a", "one"), ("b", "two"), ("a", "three")]
        >>> grouped(Pair(*pair)._asdict() for pair in pairs)[0]
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
        f"{source} has the columns {sorted(names)}, and data.meaning={meaning!r}, data.text={text!r}: set both to "
        f"columns that it has. Null stands for {known}"
    )


def _text_table(name: str) -> Any:
    """Lines of LoRA's format as rows with its names, ``context`` and ``completion``."""
    try:
        lines = read_lines(name)
    except OSError as error:
        raise MisconfigurationException(f"dataset={name!r} can't be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        context, separator, completion = line.partition(_SEPARATOR)
        if not separator and line.strip():
            raise MisconfigurationException(
                f"dataset={name!r}, line {number}: a line needs meaning{_SEPARATOR}text, and this one is {line!r}"
            )
        if separator:
            rows.append({"context": context, "completion": completion})
    if not rows:
        raise MisconfigurationException(f"dataset={name!r} has no rows")
    return datasets.Dataset.from_list(rows)
