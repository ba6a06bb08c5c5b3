"""Images with their captions."""

import io
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip.images import ImageFile
from recipes.shared.left_out import few


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and what is said of it.

    Attributes:
        file: of the image.
        captions: at least one, none blank.
        key: pictures with the same key never part between training and evaluation.
    """

    file: ImageFile
    captions: tuple[str, ...]
    key: str


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a text that are not blank.

    Example:
        >>> lines_of("a cat\\n\\n on a mat ")
        ('a cat', 'on a mat')
    """
    # Not splitlines(), which also splits at rare characters that may stand within a caption, such as U+2028.
    return tuple(line.strip() for line in io.StringIO(text, newline=None) if line.strip())


def refuse(path: Path | str, faults: list[str]) -> None:
    """Raise an error that names the first few of the faults of a data set, if there are any."""
    if faults:
        raise MisconfigurationException(f"{path}: {few(faults, '; ')}. Mend or remove them")
