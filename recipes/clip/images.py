"""Reading images: errors that name the file, and a check of all images before training."""

import glob
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image, ImageOps
from tqdm import tqdm

from recipes.data.left_out import few
from recipes.training.ranks import rank

_LONGEST = 200  # characters of a broken file's name, which may be a whole image as text by mistake
_ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic", ".heif"}
PART_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""The part that the images in a folder of this name belong to."""


@dataclass(frozen=True)
class Embedded:
    """An image inside a table, which Pillow opens like a file: its bytes are read when needed.

    Attributes:
        name: name for messages.
        read: returns its bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageFile = str | Path | Embedded


def read_image(path: ImageFile) -> Image.Image:
    """Return an image in RGB, turned by its EXIF orientation, with transparent parts in white.

    Args:
        path: file in any format that Pillow reads with 8 bits per channel.

    Raises:
        MisconfigurationException: it can't be read; the message names the file and the reason.
    """
    try:
        with Image.open(cast("Any", path)) as opened:
            _refuse_wide(opened)
            # In place, since otherwise every image would be copied, turned or not.
            ImageOps.exif_transpose(opened, in_place=True)
            return on_white(opened) if opened.has_transparency_data else opened.convert("RGB")
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise MisconfigurationException(f"{path} can't be read as an image: {_reason(error)}") from error


@contextmanager
def drawing(*seeds: int) -> Iterator[None]:
    """Seed everything that is drawn inside, in whichever process; all generators are restored afterwards.

    They are Python's, NumPy's and PyTorch's on the CPU: open_clip's transforms draw from any of them, and so does
    dropout.
    """
    (seed,) = np.random.SeedSequence(seeds).generate_state(1).tolist()
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield


Size = tuple[int, int]


def readable(
    paths: Sequence[ImageFile],
    skip_unreadable: bool = False,
    refuses: Callable[[Size], str | None] = lambda size: None,
) -> list[int]:
    """Find the images that can be read: each is decoded once, with a progress bar if there are many.

    Args:
        paths: paths of images.
        skip_unreadable: leave out broken images and say which, instead of raising an error.
        refuses: given a width and a height in pixels, returns why such an image can't be used, or None.

    Returns:
        The indices of the readable images, in order.

    Raises:
        MisconfigurationException: an image can't be read and is not to be skipped, or none can be read.
    """
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter's lock
        results = pool.map(partial(_problem, refuses=refuses), paths)
        # Every rank has to know which images can be read, but one progress bar is enough.
        hidden = len(paths) < 1000 or rank() != 0
        problems = list(tqdm(results, total=len(paths), desc="Checking images", unit="image", disable=hidden))
    broken = []
    for path, problem in zip(paths, problems, strict=True):
        if problem is not None:
            broken.append(f"{str(path)[:_LONGEST]} ({problem})")
    if not broken:
        return list(range(len(paths)))
    problem = f"{len(broken)} of {len(paths)} images can't be read: {few(broken)}"
    if not skip_unreadable:
        raise MisconfigurationException(f"{problem}. Fix or remove them, or set skip_unreadable to leave them out")
    if len(broken) == len(paths):
        raise MisconfigurationException(f"{problem}. Nothing is left")
    rank_zero_warn(f"skip_unreadable: {problem}; left out")
    return [index for index, problem in enumerate(problems) if problem is None]


def blind_skips(skip_unreadable: bool, check_images: bool) -> list[str]:
    """Return the problems of these two settings of a data module."""
    if skip_unreadable and not check_images:
        return ["skip_unreadable needs check_images, which finds the images to skip: set check_images to true"]
    return []


def _problem(path: ImageFile, refuses: Callable[[Size], str | None]) -> str | None:
    """Return an image's problem, or None."""
    try:
        with Image.open(cast("Any", path)) as image:
            _refuse_wide(image)
            problem = refuses(image.size)
            image.draft("RGB", (1, 1))  # JPEG: reads all, but decodes to an eighth of the size, several times faster
            image.load()
    except Exception as error:
        return _reason(error)
    return problem


def _refuse_wide(image: Image.Image) -> None:
    # Pillow would cut every value above 255 to white.
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}): save it with 8")


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, with transparent parts in white."""
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error)[:_LONGEST] or type(error).__name__


def image_files(folder: Path) -> list[Path]:
    """Return all images at any depth below a folder, by the common file endings, sorted; links are followed.

    Hidden folders are skipped, such as a notebook's .ipynb_checkpoints. Whether a file can be read is checked later,
    with an error that names it.
    """
    found = []
    for name in glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True):
        path = Path(name)
        if path.suffix.lower() in _ENDINGS and "__MACOSX" not in path.relative_to(folder).parts and path.is_file():
            found.append(path)
    # File systems list files in different orders, and a seed must draw the same ones everywhere.
    return sorted(found, key=str)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is not the user's own, such as ``.DS_Store`` or ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"
