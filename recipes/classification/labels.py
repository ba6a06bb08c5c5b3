"""The labels of a table: classes by name or numbers to predict, with the rows that have none."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def class_names(table: Any, column: str, source: str) -> list[str]:
    """The classes of a table: those that the Hub declares, in its order, otherwise those that occur, sorted.

    Beside two or more integers from 0 on, -1 is not a class: it stands for a missing label, as on the Hub.

    Args:
        table: a ``datasets.Dataset``.
        column: of the labels.
        source: what to call the table in messages.

    Raises:
        MisconfigurationException: there are fewer than two, or they are neither numbers nor names.
    """
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    given = [value for value in map(_given, table[column]) if value is not None]
    values = [_number(value) for value in given]
    if any(isinstance(value, str) for value in values):  # then "1" is a name as well
        values = given
    # Before they are made a set, which lists can't be in. Numbers beside names have no order.
    of_one_kind = int if values and isinstance(values[0], int) else str
    odd = [value for value in values if not isinstance(value, of_one_kind)]
    found = set() if odd else set(values)
    shown = [*values[:1], *odd] if odd else found
    if len(found) < 2:
        raise MisconfigurationException(
            f"{source}: the column {column!r} must hold numbers or names of two classes at least, got "
            f"{sorted(set(map(repr, shown)))[:5]}; set regression to true for numbers to predict; a text has one label"
        )
    others = found - {-1}
    if len(others) > 1 and all(isinstance(value, int) and value >= 0 for value in others):
        found = others
    return [str(value) for value in sorted(found)]


def class_labels(table: Any, column: str, classes: Sequence[str], source: str) -> list[int | None]:
    """The place of each row's class in ``classes``; None for a row without a label, which the Hub marks with -1.

    Raises:
        MisconfigurationException: a class is not among them.
    """
    places: dict[Any, int | None] = {name: place for place, name in enumerate(classes)}
    feature = table.features[column]
    labels: list[int | None] = []
    for given in map(_given, table[column]):
        is_name = isinstance(given, str) and given in places
        value: Any = given if is_name else _number(given)
        name = None if value is None else str(value)
        if isinstance(feature, datasets.ClassLabel) and value is not None:
            name = feature.int2str(value) if value >= 0 else None
        if value == -1 and name not in places:
            name = None
        if name is not None and name not in places:
            raise MisconfigurationException(
                f"{source}: the column {column!r} holds {name!r}, which is none of the classes {list(classes)} of the "
                "training data"
            )
        labels.append(None if name is None else places[name])
    return labels


def _given(value: Any) -> Any:
    """A label without the spaces around it; None for an empty one, and for nan."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return value.strip() or None if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """A class that is written as a number, as in the texts of a CSV file: 1 for 1.0, "1" and "1.0"; others as given."""
    # Not "01", which may be another class than "1".
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", value):
        value = float(value) if "." in value else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def numbers(table: Any, column: str, source: str) -> list[float | None]:
    """Each row's number; None for one without, and for all rows if all are -1, as in the test set of STS-B.

    Raises:
        MisconfigurationException: the column holds something else.
    """
    values: list[float | None] = []
    for given in table[column]:
        try:
            value = math.nan if given is None else float(given)  # a CSV file holds texts, such as "3.5"
        except (TypeError, ValueError):
            value = math.inf
        if math.isinf(value):
            raise MisconfigurationException(
                f"{source}: the column {column!r} must hold numbers for a regression, got {given!r}"
            )
        values.append(None if math.isnan(value) else value)
    if set(values) == {-1}:
        return [None] * len(values)
    return values


def labelled(labels: Sequence[Any], column: str, source: str, skip: bool) -> list[int]:
    """The rows that have a label.

    Args:
        labels: of all rows; None for one without.
        column: that they come from.
        source: what to call the table in messages.
        skip: leave out rows without a label, instead of an error.

    Raises:
        MisconfigurationException: rows without a label are not to be left out, or no others are there.
    """
    rows = [row for row, label in enumerate(labels) if label is not None]
    missing = len(labels) - len(rows)
    if missing and not (skip and rows):
        remedy = "choose another split"
        if rows:
            remedy = "set skip_unlabelled to true to leave them out, or if -1 is a class, write a name for it"
        raise MisconfigurationException(
            f"{source}: the column {column!r} must hold numbers or names, and {missing} of {len(labels)} rows have no "
            f"label (nothing, or the Hub's -1, with which GLUE hides the labels of its test sets): {remedy}"
        )
    return rows


def draw_shots(keys: Sequence[str], labels: Sequence[int], number: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and others for validation, drawn at random: ``number`` of each class, or what there is.

    No text is drawn twice. A class with too few rows for both fills the training rows first.

    Args:
        keys: of the texts; equal texts have equal keys.
        labels: of the rows.
        number: of rows of a class in each of the two.
        seed: of the draw.

    Example:
        >>> train, validation = draw_shots(["a", "b", "c", "d"], [0, 0, 1, 1], 1, seed=13)
        >>> len(train), len(validation), sorted(train + validation)
        (2, 2, [0, 1, 2, 3])
    """
    train: list[int] = []
    validation: list[int] = []
    drawn: Counter[int] = Counter()
    seen: set[str] = set()
    for row in np.random.default_rng(seed).permutation(len(labels)).tolist():
        if keys[row] in seen or drawn[labels[row]] == 2 * number:
            continue
        seen.add(keys[row])
        drawn[labels[row]] += 1
        part = train if drawn[labels[row]] <= number else validation
        part.append(row)
    return train, validation
