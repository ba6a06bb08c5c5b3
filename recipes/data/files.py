"""Files that other runs and later starts rely on."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, in place of one that is there: a stop leaves the old file, and never half of the new.

    Args:
        path: of the file; its folder exists.
        text: all that it is to hold, written in UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "result.json")
        ...     write_whole(path, "{}")
        ...     path.read_text(encoding="utf-8")
        '{}'
    """
    # With the process in its name, since several of them may share a folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file, without a byte order mark and without their ends.

    Args:
        path: of a file in UTF-8; "~" stands for the user's folder.

    Raises:
        OSError: it can't be read.
        MisconfigurationException: it is in another encoding.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "prompts.txt")
        ...     _ = path.write_bytes("\\ufeffWhy?\\r\\nHow\\u2028so?".encode())
        ...     read_lines(path)
        ['Why?', 'How\\u2028so?']
    """
    # Not splitlines(), which also splits at rare characters that may stand within a text, such as U+2028.
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise MisconfigurationException(f"{path} is not in UTF-8 ({error}): save it in UTF-8") from error


def set_aside(path: Path) -> None:
    """Give a file or folder that is there another name, with the first number that is free, and say so.

    So nothing is lost of what an earlier start has written.

    Args:
        path: that something new is about to take.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     answers = Path(folder, "answers.jsonl")
        ...     answers.touch()
        ...     set_aside(answers)  # doctest: +ELLIPSIS
        ...     set_aside(answers)  # there is none now
        ...     [path.name for path in Path(folder).iterdir()]
        /...answers.jsonl was there already, and is now called answers-1.jsonl
        ['answers-1.jsonl']
    """
    if not path.exists():
        return
    # A folder's name has no ending, though it may have a dot in it.
    stem, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while path.with_name(f"{stem}-{number}{ending}").exists():
        number += 1
    aside = path.rename(path.with_name(f"{stem}-{number}{ending}"))
    print(f"{path} was there already, and is now called {aside.name}", flush=True)


def begin_folder(folder: Path, own: str, written: Sequence[str]) -> None:
    """Make a command's folder, and set aside what others have left in it under the names of the command's own files.

    Args:
        folder: that the user has named, which may hold other things.
        own: the file by which the command knows a folder that it has begun.
        written: names of the files that it replaces in its folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "table.md").touch()
        ...     begin_folder(Path(folder), "results.jsonl", ["table.md"])  # doctest: +ELLIPSIS
        /...table.md was there already, and is now called table-1.md
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / own).exists():
        for name in written:
            set_aside(folder / name)


def refuse_unless_new(folder: Path) -> None:
    """Refuse to write a folder in which something lies already.

    Raises:
        MisconfigurationException: it is a file, or a folder that is not empty.

    Example:
        >>> refuse_unless_new(Path("nowhere"))
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise MisconfigurationException(f"{folder} is there already and is not an empty folder: give another one")
