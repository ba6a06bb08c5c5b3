"""The labels of a table: names of classes, or numbers to predict; rows may lack one."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def class_names(table: Any, column: str, source: str) -> list[str]:
    """Return a table's classes: those declared on the Hub, in its order; otherwise the values that occur, sorted.

    Next to two or more integers from 0 up, -1 is not a class but marks a missing label, as on the Hub.

    Args:
        table: a ``datasets.Dataset``.
        column: column of the labels.
        source: name of the table in messages.

    Raises:
        MisconfigurationException: there are fewer than two classes, or they are neither numbers nor names.
    """
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = [value for value in _values(table, column) if value is not None]
    found = set(values) if all(isinstance(value, int | str) for value in values) else set()
    if len(found) < 2:
        raise MisconfigurationException(
            f"{source}: the column {column!r} must hold numbers or names of at least two classes, got "
            f"{sorted(set(map(repr, values)))[:5]}; to predict numbers, set regression to true; a text has one label"
        )
    others = found - {-1}
    if len(others) > 1 and all(isinstance(value, int) and value >= 0 for value in others):
        found = others
    return [str(value) for value in sorted(found)]


def class_labels(table: Any, column: str, classes: Sequence[str], source: str) -> list[int | None]:
    """Return the index of each row's class in ``classes``; None for a row without a label, the Hub's -1.

    Raises:
        MisconfigurationException: a row's class is not in ``classes``.
    """
    indices = {name: index for index, name in enumerate(classes)}
    labels: list[int | None] = []
    for value in _values(table, column):
        is_missing = value is None or (value == -1 and "-1" not in indices)
        if not is_missing and str(value) not in indices:
            raise MisconfigurationException(
                f"{source}: the column {column!r} holds {value!r}, which is not among the classes {list(classes)} of "
                "the training data"
            )
        labels.append(None if is_missing else indices[str(value)])
    return labels


def numbers(table: Any, column: str, source: str) -> list[float | None]:
    """Return each row's number; None for a row without one, and for all rows if all are -1, as in STS-B's test set.

    Raises:
        MisconfigurationException: the column holds something other than numbers.
    """
    found: list[float | None] = []
    for value in _values(table, column):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"{source}: the column {column!r} must hold numbers for a regression, got {value!r}"
            ) from error
        found.append(number if math.isfinite(number) else None)
    return [None] * len(found) if set(found) == {-1} else found


def _values(table: Any, column: str) -> list[Any]:
    """Return each row's label or None. Classes declared on the Hub become names, and its -1 becomes None."""
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(value) if value is not None and value >= 0 else None for value in table[column]]
    return [_value(given) for given in table[column]]


def _value(given: Any) -> Any:
    """Return a label: names without surrounding spaces, 1 for 1.0, and None for an empty value or nan."""
    if isinstance(given, float):
        if math.isnan(given):
            return None
        return int(given) if given.is_integer() else given
    return given.strip() or None if isinstance(given, str) else given


def draw_shots(keys: Sequence[str], labels: Sequence[int], number: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw random rows for training and others for validation: ``number`` per class each, or as many as there are.

    No text is drawn twice. A class with too few rows for both fills the training rows first.

    Args:
        keys: keys of the texts; equal texts have equal keys.
        labels: labels of the rows.
        number: rows per class in each of the two.
        seed: seed of the draw.

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
