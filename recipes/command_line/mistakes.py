"""A mistake of the user's ends a command with its message, and without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.progress import without_hints


@contextmanager
def without_traceback() -> Iterator[None]:
    """End the process with status 1 and a message where the settings or the data are wrong; for ``__main__``.

    What other libraries say in every run is silenced, see :func:`recipes.command_line.progress.without_hints`.
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
    """Return the message for the user that an exception is, or was raised from; None where it is a defect of the code.

    jsonargparse raises a ValueError of many lines in place of what a class has raised.

    Example:
        >>> mistake_behind(ValueError("a defect")) is None
        True
    """
    while error is not None:
        if isinstance(error, MisconfigurationException):
            return error
        error = error.__cause__
    return None
