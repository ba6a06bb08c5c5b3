"""Reading images: errors that name the file, and one pass over a folder before training that finds what is broken."""

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

_LONGEST = 200  # characters of a broken file's name, which may be an image in text form by mistake
_ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic", ".heif"}


@dataclass(frozen=True)
class Embedded:
    """An image inside of a table, which Pillow opens as it opens a path: its bytes are read when needed.

    Attributes:
        name: for messages.
        read: gives its bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageFile = str | Path | Embedded


def read_image(path: ImageFile) -> Image.Image:
    """Return an image in RGB, turned as its EXIF orientation says, with white for what is transparent.

    Args:
        path: of any format that Pillow reads, with 8 bits per channel.

    Raises:
        MisconfigurationException: it can't be read; the message names the file and the reason.
    """
    try:
        with Image.open(cast("Any", path)) as opened:
            _refuse_wide(opened)
            # In place, since a copy would be made of every image, turned or not.
            ImageOps.exif_transpose(opened, in_place=True)
            return on_white(opened) if opened.has_transparency_data else opened.convert("RGB")
    except Exception as error:  # decoders raise of many kinds: OSError, SyntaxError, struct.error, ...
        raise MisconfigurationException(f"{path} can't be read as an image: {_reason(error)}") from error


@contextmanager
def drawing(*seeds: int) -> Iterator[None]:
    """Let these numbers decide what is drawn inside, in whichever process; all generators are put back afterwards.

    They are Python's, NumPy's and PyTorch's on the CPU, from any of which open_clip's transforms draw, and dropout too.
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
    """Find out which of these images can be read: each is decoded once, with a progress bar if there are many.

    Args:
        paths: of images.
        skip_unreadable: leave broken ones out, and say how many and which, instead of an error.
        refuses: says of a width and a height, in pixels, why no such image can be used; None if it can.

    Returns:
        The indices of those that can be read, in order.

    Raises:
        MisconfigurationException: an image can't be read and is not to be skipped, or no image can.
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
        raise MisconfigurationException(f"{problem}. Mend or remove them, or set skip_unreadable to leave them out")
    if len(broken) == len(paths):
        raise MisconfigurationException(f"{problem}. Nothing is left")
    rank_zero_warn(f"skip_unreadable: {problem}; left out")
    return [index for index, problem in enumerate(problems) if problem is None]


def blind_skips(skip_unreadable: bool, check_images: bool) -> list[str]:
    """Return what is wrong with these two settings of a data module."""
    if skip_unreadable and not check_images:
        return ["skip_unreadable needs check_images, which finds what is to be skipped: set it to true"]
    return []


def _problem(path: ImageFile, refuses: Callable[[Size], str | None]) -> str | None:
    """Return what is wrong with an image, or None."""
    try:
        with Image.open(cast("Any", path)) as image:
            _refuse_wide(image)
            problem = refuses(image.size)
            image.draft("RGB", (1, 1))  # JPEG: read all, but decode to an eighth of the size, several times faster
            image.load()
    except Exception as error:
        return _reason(error)
    return problem


def _refuse_wide(image: Image.Image) -> None:
    # Pillow would cut every value above 255 to white.
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}): save it with 8")


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, with white instead of what is transparent."""
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error)[:_LONGEST] or type(error).__name__


def image_files(folder: Path) -> list[Path]:
    """Return all images at any depth below a folder, by the common endings, in order; links are followed.

    Not those in hidden folders, such as a notebook's .ipynb_checkpoints/cat-checkpoint.png. Whether a file can be read
    is found out later, with an error that names it.
    """
    found = []
    for name in glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True):
        path = Path(name)
        if path.suffix.lower() in _ENDINGS and "__MACOSX" not in path.relative_to(folder).parts and path.is_file():
            found.append(path)
    # File systems list files in different orders, and a seed has to draw the same ones.
    return sorted(found, key=str)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is not the user's own, as ``.DS_Store`` and ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"
