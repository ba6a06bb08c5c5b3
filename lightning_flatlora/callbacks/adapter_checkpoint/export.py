"""Write a checkpoint's file and its folder in peft's own format, and recognize our folders on the disk.

A folder is ours if it holds our list, which names its checkpoint and all that was written into it. It is deleted if
nothing else is in it, and a folder that is not ours is never written into.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_flatlora.callbacks.adapter_checkpoint import contents
from lightning_flatlora.pairs.finders import litgpt_pairs
from lightning_flatlora.pairs.lora_pair import Finder

# Version of what we write into files and folders; those that name none are of the first version, too.
FORMAT = 1
# In each folder: the name and the step of its checkpoint, and the names of what we wrote.
LIST = ".adapter_checkpoint.json"
# Suffix of the hidden names of incomplete files and folders.
PARTIAL = ".adapter-checkpoint-partial"
# Seconds after which such a place is taken to be abandoned.
_STALE = 3600


def write(
    checkpoint: dict[str, Any], frozen: dict[str, Tensor], path: Path, module: nn.Module, finder: Finder | None
) -> None:
    """Write a checkpoint's file, and a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    Both are complete and on the disk before one is put in its place. The file comes first: so a folder without a file
    is one whose file somebody has deleted.

    Args:
        checkpoint: has the values in its "state_dict", by the module's clean names.
        frozen: what is known of the base.
        path: the file's.
        module: holds the adapters.
        finder: finds factors that are not peft's.
    """
    folder = folder_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_place(path.parent) as place:
            adapters, file = place / "adapters", place / path.name
            adapters.mkdir()
            with contents.unwrapped(module):
                _save_adapters(module, {**frozen, **checkpoint["state_dict"]}, adapters, finder)
            # Lightning may write to another disk, and copies.
            with file.open("wb") as opened:
                torch.save(checkpoint, opened)
            # Together with leftovers of an older one.
            names = {str(each.relative_to(adapters)) for each in adapters.rglob("*")}
            names.update(_read_list(folder).get("files", ()))
            found = {"checkpoint": path.name, "step": checkpoint["global_step"], "files": sorted(names)}
            (adapters / LIST).write_text(json.dumps({"format": FORMAT, **found}, indent=1))
            for each in filter(Path.is_file, place.rglob("*")):
                with each.open("rb+") as opened:
                    os.fsync(opened.fileno())
            file.replace(path)
            _put_in_place(adapters, folder, path)
    except (OSError, SafetensorError) as error:
        size = sum(each.numel() * each.element_size() for each in tree_leaves(checkpoint) if isinstance(each, Tensor))
        raise OSError(f"AdapterCheckpoint: could not write {path} ({size / 1e6:,.1f} MB): {error}") from error


def _save_adapters(module: nn.Module, state: Mapping[str, Any], folder: Path, finder: Finder | None) -> None:
    """Write every adapter of a module.

    Each adapter that is not called "default" has a subfolder, as in peft. If several parts of the module hold adapters,
    each part has a subfolder.
    """
    hosts = contents.hosts(module, finder)
    for name, host in hosts.items():
        for config in getattr(host, "peft_config", {}).values():
            vars(config).update({key: _plain(value) for key, value in vars(config).items()})
        prefix = f"{name}." if name else ""
        of_host = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        place = folder if len(hosts) == 1 else folder / name
        place.mkdir(parents=True, exist_ok=True)
        if isinstance(host, PeftModel):
            host.save_pretrained(str(place), state_dict=of_host)
        elif hasattr(host, "peft_config"):
            _save_injected(host, of_host, place)
        else:
            factors = {key: of_host[key] for key in contents.found_factors(host, finder)}
            # The name and the form that litgpt's scripts read, or plain safetensors.
            if finder is litgpt_pairs:
                torch.save({"model": factors}, place / "lit_model.pth.lora")
            else:
                _save_tensors(factors, place / "factors.safetensors")
    card = getattr(module, "adapter_card", None)
    if hosts and card is not None:  # in place of the form that peft leaves to be filled in
        (folder / "README.md").write_text(card, encoding="utf-8")


def _save_injected(host: Any, state: dict[str, Any], folder: Path) -> None:
    """Write what peft would write of a module that is not wrapped in one of its models."""
    for name, config in host.peft_config.items():
        place = folder if name == "default" else folder / name
        config.save_pretrained(str(place))
        weights = get_peft_model_state_dict(host, state, name)
        tensors = {f"base_model.model.{key}": value for key, value in weights.items()}
        _save_tensors(tensors, place / "adapter_model.safetensors")


def _plain(value: Any) -> Any:
    """Replace other kinds of dicts and lists, such as OmegaConf's, which JSON can't write."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple)
    return [_plain(each) for each in value] if is_list else value


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, file, metadata={"format": "pt"})


# -- the place on the disk


def folder_of(checkpoint: Path) -> Path:
    """Give the place of a checkpoint's folder, whatever is there.

    Example:
        >>> folder_of(Path("runs/epoch=0-step=10.ckpt")).name
        'epoch=0-step=10'
    """
    return checkpoint.with_suffix("")


def is_ours(folder: Path, checkpoint: Path) -> bool:
    """Report whether we wrote a folder for a checkpoint."""
    return not folder.is_symlink() and _read_list(folder).get("checkpoint") == checkpoint.name


def _read_list(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / LIST).read_text())
        is_ours = found.get("format", FORMAT) == FORMAT and Path(found["checkpoint"]).name == found["checkpoint"]
        return found if is_ours and set(map(type, found["files"])) <= {str} else {}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}  # another program's, or damaged


@contextmanager
def partial_place(parent: Path) -> Iterator[Path]:
    """Make a hidden folder that no other job uses, for what is not complete yet, and delete what killed jobs left."""
    with TemporaryDirectory(prefix=".", suffix=PARTIAL, dir=parent, ignore_cleanup_errors=True) as name:
        place = Path(name)
        for other in parent.glob(f".*{PARTIAL}"):
            with suppress(OSError):  # another job may delete it, too
                # By the clock of the disk, which may be another machine's.
                if place.stat().st_mtime - other.stat().st_mtime > _STALE:
                    shutil.rmtree(other)
        yield place


def _put_in_place(adapters: Path, folder: Path, checkpoint: Path) -> None:
    """Move what was written to its place; there files of the same names are replaced, and all else stays."""
    if os.path.lexists(folder) and not is_ours(folder, checkpoint):
        rank_zero_warn(f"AdapterCheckpoint: {folder} stays, since it is not ours, and {checkpoint.name} has no folder")
        return
    try:
        if folder.exists():
            # One by one, so that the folder of a checkpoint that is overwritten exists at every moment. The list, which
            # names the step, comes last.
            listed = shutil.ignore_patterns(LIST)
            # A downloaded folder may hold links, which the copy would follow out of it.
            places = [folder / each.relative_to(adapters) for each in adapters.rglob("*") if each.is_dir()]
            for link in filter(Path.is_symlink, places):
                link.unlink()
            shutil.copytree(adapters, folder, ignore=listed, dirs_exist_ok=True, copy_function=os.replace)
            (adapters / LIST).replace(folder / LIST)
        else:
            adapters.rename(folder)
    except OSError as error:  # the file is whole, so the run need not end
        rank_zero_warn(f"AdapterCheckpoint: {folder} was not replaced ({error}). Does another job write there, too?")


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours, see :func:`is_ours`, unless somebody has put something else into it."""
    # Another job that shares the place may delete it, too.
    with suppress(FileNotFoundError), partial_place(folder.parent) as place:
        held = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        if held <= {LIST, *_read_list(folder).get("files", ())}:
            # Out of sight at once, so that a kill leaves no half of it under its name.
            folder.rename(place / folder.name)


def check(path: Any, step: int | None = None) -> None:
    """Refuse an adapter's folder in the place of its checkpoint's file, and warn if it is not of the file's step."""
    file = Path(str(path))
    folder, name = folder_of(file), _read_list(file).get("checkpoint")
    if name:
        raise MisconfigurationException(
            f"{path} is an adapter's folder, for PeftModel.from_pretrained: give the file {file.with_name(name)}"
        )
    other = _read_list(folder).get("step", step)
    if step not in (None, other) and is_ours(folder, file):
        rank_zero_warn(
            f"AdapterCheckpoint: {file} is of step {step} and its folder of step {other}, as a save was interrupted. "
            "The file is loaded, and the next save replaces both"
        )


def checked(mark: Any) -> Any:
    """Refuse a checkpoint's mark if it is not as we write it."""
    version = mark.get("format", FORMAT) if isinstance(mark, dict) else None
    if version != FORMAT or not all(isinstance(mark.get(part), dict) for part in ("left_out", "scalings")):
        raise MisconfigurationException(
            f"AdapterCheckpoint: the checkpoint's mark is of format {version}, where {FORMAT} is read, or damaged: "
            "install a newer lightning_flatlora, or load an intact copy"
        )
    return mark
