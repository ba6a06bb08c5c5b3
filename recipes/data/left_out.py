"""Rows that can't be used: they are left out, counted and named."""

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class UnusableRowError(MisconfigurationException):
    """A row that can't be used, for example because it has no text or several images; other rows may be fine."""


def few(names: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """Return the first few of some names, and how many more there are.

    Example:
        >>> few(["a", "b"]), few(["row 1"] * 9, "; ")
        ('a, b', 'row 1; row 1; row 1; row 1; row 1 and 4 more')
    """
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def warn_of_left_out(source: str, faults: Sequence[str], rows: int) -> None:
    """Say how many rows are left out, and why.

    Args:
        source: source of the rows.
        faults: one for each unusable row.
        rows: number of all rows.

    Raises:
        MisconfigurationException: no row is left.

    Example:
        >>> warn_of_left_out("mine.csv", [], 9)
    """
    if not faults:
        return
    counted = f"{source}: {len(faults)} of {rows} rows can't be used: {few(faults, '; ')}"
    if len(faults) == rows:
        raise MisconfigurationException(f"{counted}. Nothing is left")
    rank_zero_warn(f"{counted}. They are left out")
