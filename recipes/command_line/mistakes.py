"""End a command on a user's mistake, with its message and without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.progress import without_hints


@contextmanager
def without_traceback() -> Iterator[None]:
    """End the process with status 1 and a message if the settings or the data are wrong; for ``__main__``.

    Routine messages of other libraries are silenced, see :func:`recipes.command_line.progress.without_hints`.
    """
    without_hints()
    try:
        yield
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is None:
            raise
        sys.exit(f"Error: {mistake}")


def mistake_behind(error: BaseException | None) -> MisconfigurationException | None:
    """Return the user's message in an exception or in one that it was raised from; None if it is a defect of the code.

    jsonargparse replaces the exception that a class has raised by a ValueError of many lines.

    Example:
        >>> mistake_behind(ValueError("a defect")) is None
        True
    """
    while error is not None:
        if isinstance(error, MisconfigurationException):
            return error
        error = error.__cause__
    return None
