"""Images of a data set's rows: in files, or inside the data set."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from PIL.Image import Image

from recipes.clip.images import Embedded, Size, read_image, readable

_LONGEST = 200  # times as long as wide; Qwen's image processors refuse more


def open_image(image: dict[str, Any], name: str) -> Image:
    """Return an image in RGB.

    Args:
        image: image in the form of ``datasets``, with ``bytes`` or a ``path``.
        name: name for the error if the image has no path.

    Raises:
        MisconfigurationException: it can't be read.
    """
    data = image["bytes"]
    return read_image(image["path"] if data is None else Embedded(name, lambda: data))


def open_images(images: Sequence[dict[str, Any]], questions: Sequence[str]) -> list[Image]:
    """Return the images of questions."""
    return [open_image(image, f"the image of {asked!r}") for image, asked in zip(images, questions, strict=True)]


def too_long(size: Size) -> str | None:
    """Return why an image of this width and height can't be used, or None.

    Example:
        >>> too_long((640, 480)), too_long((1, 300))
        (None, '1 x 300 pixels: it may be at most 200 times as long as wide')
    """
    if max(size) <= _LONGEST * min(size):
        return None
    return f"{size[0]} x {size[1]} pixels: it may be at most {_LONGEST} times as long as wide"


def usable(table: Any, name: str, skip_unreadable: bool) -> list[int]:
    """Return the indices of the rows whose image can be read: each image is decoded once.

    Args:
        table: a table with a column ``image`` in the form of ``datasets``, not decoded.
        name: name of the data set.
        skip_unreadable: leave out rows with a broken image, instead of raising an error.

    Raises:
        MisconfigurationException: an image can't be read, and is not to be skipped, or none is left.
    """
    files: dict[Any, list[int]] = {}
    column = table.select_columns("image")
    for index, row in enumerate(column):
        image = row["image"]
        file = Embedded(f"{name}, row {index}", partial(_embedded, column, index)) if image["bytes"] else image["path"]
        files.setdefault(file, []).append(index)  # many data sets ask several questions about one image
    distinct = list(files)
    indices = []
    for number in readable(distinct, skip_unreadable, too_long):
        indices += files[distinct[number]]
    return sorted(indices)


def _embedded(column: Any, index: int) -> bytes:
    return cast("bytes", column[index]["image"]["bytes"])
