"""The labels of a table: classes by name or numbers to predict, with the rows that have none."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def class_names(table: Any, column: str, source: str) -> list[str]:
    """Return the classes of a table: those that the Hub declares, in its order, otherwise those that occur, sorted.

    Among two or more integers from 0 on, -1 is not a class: it stands for a missing label, as on the Hub.

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
    values = [value for value in map(_value, table[column]) if value is not None]
    found = set(values) if all(isinstance(value, int | str) for value in values) else set()
    if len(found) < 2:
        raise MisconfigurationException(
            f"{source}: the column {column!r} must hold numbers or names of two classes at least, got "
            f"{sorted(set(map(repr, values)))[:5]}; set regression to true for numbers to predict; a text has one label"
        )
    others = found - {-1}
    if len(others) > 1 and all(isinstance(value, int) and value >= 0 for value in others):
        found = others
    return [str(value) for value in sorted(found)]


def class_labels(table: Any, column: str, classes: Sequence[str], source: str) -> list[int | None]:
    """Return the index of each row's class in ``classes``; None for a row without a label, the Hub's -1.

    Raises:
        MisconfigurationException: a class is not among them.
    """
    indices = {name: index for index, name in enumerate(classes)}
    feature = table.features[column]
    labels: list[int | None] = []
    for value in map(_value, table[column]):
        name = None if value is None else str(value)
        if isinstance(feature, datasets.ClassLabel) and value is not None:
            name = feature.int2str(value) if value >= 0 else None
        if value == -1 and name not in indices:
            name = None
        if name is not None and name not in indices:
            raise MisconfigurationException(
                f"{source}: the column {column!r} holds {name!r}, which is none of the classes {list(classes)} of the "
                "training data"
            )
        labels.append(None if name is None else indices[name])
    return labels


def _value(given: Any) -> Any:
    """Return a label: names without spaces around them, 1 for 1.0, and None for an empty one or nan."""
    if isinstance(given, float):
        if math.isnan(given):
            return None
        return int(given) if given.is_integer() else given
    return given.strip() or None if isinstance(given, str) else given


def numbers(table: Any, column: str, source: str) -> list[float | None]:
    """Each row's number; None for one without, and for all rows if all are -1, as in the test set of STS-B.

    Raises:
        MisconfigurationException: the column holds something else.
    """
    values: list[float | None] = []
    for given in table[column]:
        try:
            value = math.nan if given is None else float(given)
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
