"""Writing and reading files that other runs rely on."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, replacing an existing one: a stop leaves the old file or the new one, never a half.

    Args:
        path: path of the file, in a folder that exists.
        text: all of its content, written in UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "result.json")
        ...     write_whole(path, "{}")
        ...     path.read_text(encoding="utf-8")
        '{}'
    """
    # With the process in its name, since several processes may share a folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file, without a byte order mark and without their ends.

    Args:
        path: path of a file in UTF-8; "~" is the user's home folder.

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
    """Rename a file or folder that exists, with the first free number, and say so, so that earlier results are kept.

    Args:
        path: where something new will be written.

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
    """Make a command's folder, and rename files of others in it that have the names of the command's own files.

    Args:
        folder: folder given by the user, which may hold other things.
        own: file by which the command recognizes a folder that it has begun.
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
    """Refuse to write into a folder that holds something already.

    Raises:
        MisconfigurationException: it is a file, or a folder that is not empty.

    Example:
        >>> refuse_unless_new(Path("nowhere"))
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise MisconfigurationException(f"{folder} exists and is not an empty folder: give another one")
