"""The peft folder beside a checkpoint: what is in it, and which files on the disk are ours.

Each folder holds a small list of the files that were written into it. Nothing else is ever deleted. A folder that
somebody else has made stays as it is, and ours then gets another name.
"""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lightning_flatlora.callbacks.checkpoint.loading import is_of_first_release

LIST = ".adapter_checkpoint.json"
"""In each folder: the name of its checkpoint, its files, and whether that checkpoint has been written since."""
_PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"}


def adapter_folder(checkpoint: str | Path, extension: str = ".ckpt") -> Path:
    """The peft folder of a checkpoint: the one that is there, or else the one that will be.

    It has the name of the file without its extension, or, where somebody else's file or folder has that name, the same
    with "-adapter" behind it.

    Args:
        checkpoint: the file.
        extension: what to take off its name.

    Example:
        >>> adapter_folder("runs/epoch=0-step=10.ckpt").name
        'epoch=0-step=10'
    """
    path = Path(checkpoint)
    there = existing_folder(path, extension)
    return there or next(folder for folder in _possible_names(path, extension) if is_free(folder))


def existing_folder(checkpoint: Path, extension: str = ".ckpt") -> Path | None:
    """The peft folder that we wrote for a checkpoint, if there is one."""
    for folder in _possible_names(checkpoint, extension):
        if belongs_to(folder, checkpoint):
            return folder
        if not folder.exists() and not folder.is_symlink():
            return None
    return None


def wanted_folder(checkpoint: str | Path, extension: str = ".ckpt") -> Path:
    """The name of a checkpoint's folder, unless something else has that name already."""
    return next(_possible_names(Path(checkpoint), extension))


def _possible_names(path: Path, extension: str) -> Iterator[Path]:
    bare = path.name.removesuffix(extension) if extension else path.name
    if bare and bare != path.name:
        yield path.with_name(bare)
    yield path.with_name(f"{bare or path.name}-adapter")
    for number in count(2):
        yield path.with_name(f"{bare or path.name}-adapter-{number}")


def is_free(folder: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    if folder.is_symlink():
        return False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def belongs_to(folder: Path, checkpoint: Path) -> bool:
    """Whether we wrote a folder for a checkpoint, or turned it into a link to another of ours."""
    if folder.is_symlink():
        target = Path(os.readlink(folder))
        # Ours lead to a neighbour, or into a folder beside them where a metric in the files' names has a slash. One
        # that leads elsewhere is a user's.
        if target.is_absolute() or ".." in target.parts:
            return False
        is_neighbour = len(target.parts) == 1
        return (folder / LIST).exists() or (checkpoint.is_symlink() and (is_neighbour or not folder.exists()))
    if (folder / LIST).is_file():
        return bool(_listed(folder)["checkpoint"] == checkpoint.name)
    return folder.is_dir() and _is_of_old_file(folder, checkpoint)


def _is_of_old_file(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder without a list is of the release that wrote no lists; beside a newer file it is not ours."""
    files = _files_in(folder)
    if not files or any(file.name not in _PEFT_FILES for file in files):
        return False
    return checkpoint.is_file() and is_of_first_release(checkpoint)


def _files_in(folder: Path) -> list[Path]:
    return [each for each in folder.rglob("*") if not each.is_dir()]


def _listed(folder: Path) -> dict[str, Any]:
    """A folder's list; of an old one, all that is in it."""
    if (folder / LIST).is_file():
        content: dict[str, Any] = json.loads((folder / LIST).read_text())
        return content
    return {"checkpoint": "", "files": [str(file.relative_to(folder)) for file in _files_in(folder)]}


def begin_folder(folder: Path) -> Path:
    """An empty hidden folder beside the one to be written, which is moved into place once it is complete."""
    partial = aside(folder)
    if (partial / LIST).exists():  # of a run that was killed
        shutil.rmtree(partial)
    number = 1
    while not is_free(partial):
        number += 1
        partial = folder.with_name(f".{folder.name}.{number}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / LIST).write_text(json.dumps({"checkpoint": "", "files": []}))
    return partial


def put_in_place(partial: Path, folder: Path, checkpoint: Path) -> None:
    """Move a written folder to its place; files of ours that are there already are replaced one by one.

    Args:
        partial: what :func:`begin_folder` gave, filled.
        folder: the place, of ours or free.
        checkpoint: the file that it belongs to, which is written after it.
    """
    files = [str(file.relative_to(partial)) for file in _files_in(partial) if file.name != LIST]
    if folder.is_symlink():
        folder.unlink()
    before = _listed(folder)["files"] if folder.is_dir() else []
    # The files are of a run that was killed before it wrote the checkpoint.
    if before and not checkpoint.exists():
        remove_folder(folder)
        before = []
    old = [name for name in before if name not in files]
    # The list is written before the files. A file that is listed but missing does no harm, whereas one that is there
    # but not listed would never be deleted.
    (partial / LIST).write_text(json.dumps({"checkpoint": checkpoint.name, "files": [*files, *old]}, indent=1))
    if not folder.exists():
        partial.rename(folder)
        return
    for name in [LIST, *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # One by one, so that the folder of a checkpoint that is overwritten exists at every moment.
        (partial / name).replace(folder / name)
    _unlink(folder, old)
    shutil.rmtree(partial)


def note_checkpoint(folder: Path, is_there: bool) -> None:
    """Note in a folder's list whether its checkpoint is written: after the file is, and before it is removed."""
    if not folder.is_symlink():
        _replace_list(folder, {**_listed(folder), "has_checkpoint": is_there})


def leave_to_user(checkpoint: Path, extension: str = ".ckpt") -> Path | None:
    """Give up the folder of a finished checkpoint whose file somebody has deleted, and kept the folder.

    A folder whose file was never written is of a process that was killed, and stays ours.

    Args:
        checkpoint: a file that is about to be written or removed.
        extension: what to take off its name.

    Returns:
        The checkpoint's folder, where it stays ours.
    """
    folder = existing_folder(checkpoint, extension)
    if folder is None or folder.is_symlink() or checkpoint.exists():
        return folder
    content = _listed(folder)
    if not content.get("has_checkpoint"):
        return folder
    _replace_list(folder, {**content, "checkpoint": ""})
    return None


def _replace_list(folder: Path, content: dict[str, Any]) -> None:
    partial = aside(folder / LIST)
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(folder / LIST)


def remove_folder(folder: Path) -> None:
    """Delete what we wrote, and the folder if nothing else is in it.

    Args:
        folder: of ours, see :func:`belongs_to`; or empty.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        _unlink(folder, _listed(folder)["files"])
        (folder / LIST).unlink(missing_ok=True)
        _remove_if_empty(folder)


def _unlink(folder: Path, files: list[str]) -> None:
    for name in files:
        # The list is a file that anybody may have edited, so nothing outside of the folder is ever deleted.
        if ".." not in Path(name).parts and not Path(name).is_absolute():
            (folder / name).unlink(missing_ok=True)
    inner: set[Path] = set()
    for name in files:
        inner.update(parent for parent in Path(name).parents if parent.parts)
    # The innermost first, so that a folder that held nothing else is empty when its turn comes.
    for parent in sorted(inner, key=lambda each: len(each.parts), reverse=True):
        _remove_if_empty(folder / parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def link(target: Path, place: Path) -> None:
    """Make a link, or turn it to another target, in one move, so that it always leads somewhere.

    Args:
        target: of the link.
        place: free, or a link, a file, or an empty folder that makes way for the link.

    Raises:
        OSError: it is a folder with something in it.
    """
    new = aside(place)
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, place.parent), target_is_directory=target.is_dir())
    if place.is_dir() and is_free(place):
        place.rmdir()
    # A rename, which replaces the old link at once: at no moment is there none.
    new.replace(place)


def aside(path: Path) -> Path:
    """A hidden name beside a file or folder, for what is not complete yet."""
    return path.with_name(f".{path.name}.partial")
