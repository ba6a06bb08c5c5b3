"""Reading images: errors that name the file, and one pass over a folder before training that finds what is broken."""

import os
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

from recipes.shared.left_out import few
from recipes.shared.ranks import rank

_HIGHEST_OF_12_BITS = 4095
_LONGEST = 200  # characters of a broken file's name, which may be an image in text form by mistake
_MORE_ENDINGS = (".heic", ".heif", ".qoi", ".dds")  # of telephones, which Pillow reads with a plugin alone; and others


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
    """An image in RGB, turned as its EXIF orientation says; what is transparent becomes white.

    Args:
        path: of any format that Pillow reads, with 8 bits a channel, or 16 in grey.

    Raises:
        MisconfigurationException: it can't be read; the message names the file and the reason.
    """
    try:
        with Image.open(cast("Any", path)) as opened:
            problem = _wide(opened)
            if problem is not None:
                raise ValueError(problem)
            # In place, since a copy would be made of every image, turned or not.
            ImageOps.exif_transpose(opened, in_place=True)
            image: Image.Image = opened
            if image.mode.startswith("I"):
                # Pillow would cut every value above 255 to white.
                image = image.convert("I")
                _, highest = cast("tuple[int, int]", image.getextrema())
                if highest <= _HIGHEST_OF_12_BITS:
                    # Not scaled by itself: among others that use all bits it would be a dark image made bright.
                    rank_zero_warn(
                        "an image of 16 bits holds only values that fit into 12, as some cameras store them, and "
                        "is read as nearly black: scale such images to all 16 bits, or to 8, before training"
                    )
                image = image.point(lambda value: value / 257).convert("L")
            return on_white(image) if image.has_transparency_data else image.convert("RGB")
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
    """Which of these images can be read: each is decoded once, with a progress bar where there are many.

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
    broken = [f"{shortened(str(path))} ({problem})" for path, problem in zip(paths, problems, strict=True) if problem]
    if not broken:
        return list(range(len(paths)))
    problem = f"{len(broken)} of {len(paths)} images can't be read: {few(broken)}"
    if not skip_unreadable:
        raise MisconfigurationException(f"{problem}. Mend or remove them, or set skip_unreadable to leave them out")
    if len(broken) == len(paths):
        raise MisconfigurationException(f"{problem}. Nothing is left")
    rank_zero_warn(f"skip_unreadable: {problem}; left out")
    return [index for index, problem in enumerate(problems) if problem is None]


def shortened(text: str) -> str:
    """A text for a message, without its middle where it is very long.

    Example:
        >>> len(shortened("x" * 10_000)), shortened("cat.jpg")
        (200, 'cat.jpg')
    """
    half = _LONGEST // 2 - 2
    return text if len(text) <= _LONGEST else f"{text[:half]}....{text[-half:]}"


def blind_skips(skip_unreadable: bool, check_images: bool) -> list[str]:
    """What is wrong with these two settings of a data module."""
    if skip_unreadable and not check_images:
        return ["skip_unreadable needs check_images, which finds what is to be skipped: set it to true"]
    return []


def _problem(path: ImageFile, refuses: Callable[[Size], str | None]) -> str | None:
    """What is wrong with an image, or None."""
    try:
        with Image.open(cast("Any", path)) as image:
            problem = _wide(image) or refuses(image.size)
            image.draft("RGB", (1, 1))  # JPEG: read all, but decode to an eighth of the size, several times faster
            image.load()
    except Exception as error:
        return _reason(error)
    return problem


def _wide(image: Image.Image) -> str | None:
    """Why an image with 32 bits a value can't be used; None for all others."""
    # A PNG has at most 16, for which some versions of Pillow say "I" and some "I;16".
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return f"it has 32 bits a value (mode {image.mode}), whose range nobody knows: save it with 8 bits a channel"
    return None


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, with white where it was transparent."""
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return shortened(str(error)) or type(error).__name__


def image_endings() -> frozenset[str]:
    """The endings, in lower case, of files that are taken for images: those that Pillow knows, and those of telephones.

    Whether a file can be read is found out later, with an error that names it.

    Example:
        >>> {".jpg", ".gif", ".heic"} <= image_endings(), {".pdf", ".h5"} & image_endings()
        (True, set())
    """
    of_images = set(_MORE_ENDINGS)
    for ending, kind in Image.registered_extensions().items():
        # Without such a type are formats of data, as HDF5's, for which Pillow has a name but no decoder.
        if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/"):
            of_images.add(ending)
    return frozenset(of_images)


def image_files(folder: Path) -> list[Path]:
    """All files at any depth below a folder whose name ends like an image's, in order; links are followed."""
    found: list[Path] = []
    endings = image_endings()
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        # Each folder once: links to folders above give ever longer paths, and with two of them the walk would not end.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Without what notebooks and archives leave in hidden folders, such as .ipynb_checkpoints/cat-checkpoint.png. In
        # the order of the paths, the first of which stands for a folder that several links give.
        folders[:] = sorted((name for name in folders if not is_hidden(name)), key=lambda name: f"{name}/")
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in endings and not is_hidden(name) and path.is_file():
                found.append(path)
    # File systems list files in different orders, and a seed has to draw the same ones.
    return sorted(found, key=str)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's own, as ``.DS_Store`` and ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"
