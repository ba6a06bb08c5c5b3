"""Write a checkpoint's file and the folder in peft's own format beside it, and know which folders on the disk are ours.

A folder is ours if it holds our list, which names its checkpoint and all that was written into it. It is deleted if
nothing else is in it, and a folder that is not ours is never written into.
"""

import json
import os
import shutil
from collections.abc import Mapping, MutableSequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_flatlora.callbacks.adapter_checkpoint import contents
from lightning_flatlora.pairs.finders import litgpt_pairs
from lightning_flatlora.pairs.lora_pair import Finder

# In each folder: the name of its checkpoint, and the names of what we wrote.
LIST = ".adapter_checkpoint.json"


def write(
    checkpoint: dict[str, Any], frozen: dict[str, Tensor], path: Path, module: nn.Module, finder: Finder | None
) -> None:
    """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads, and then the file; each as a whole.

    Args:
        checkpoint: with the values in its "state_dict", by the module's clean names.
        frozen: what is known of the base.
        path: of the file.
        module: holds the adapters.
        finder: of factors that are not peft's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = folder_of(path)
    if os.path.lexists(folder) and not is_ours(folder, path):
        rank_zero_warn(f"AdapterCheckpoint: {folder} stays, since it is not ours, and {path.name} has no folder")
    else:
        partial = aside(folder)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        with contents.unwrapped(module):
            _save_adapters(module, {**frozen, **checkpoint["state_dict"]}, partial, finder)
        _put_in_place(partial, folder, path)
    partial = aside(path)
    # Lightning may write to another disk, and copies.
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        # On the disk before the rename, so that a crash leaves the old file or the whole new one.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
    return [_plain(each) for each in value] if isinstance(value, MutableSequence) else value


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(copies, file, metadata={"format": "pt"})


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
    file = folder / LIST
    return json.loads(file.read_text()) if file.is_file() else {}


def aside(path: Path) -> Path:
    """Give a hidden name beside a file or folder, which only we use, for what is not complete yet."""
    return path.with_name(f".{path.name}.adapter-checkpoint-partial")


def _put_in_place(partial: Path, folder: Path, checkpoint: Path) -> None:
    """Move a written folder to its place; what is there of the same names is replaced, and all else stays."""
    names = {str(path.relative_to(partial)) for path in partial.rglob("*")}
    # With what an older one has left there.
    files = sorted(names.union(_read_list(folder).get("files", ())))
    (partial / LIST).write_text(json.dumps({"checkpoint": checkpoint.name, "files": files}, indent=1))
    if not folder.exists():
        partial.rename(folder)
        return
    # The list before the files. A file that is listed but missing does no harm, whereas with one that is there but not
    # listed the folder would never be deleted.
    (partial / LIST).replace(folder / LIST)
    # One by one, so that the folder of a checkpoint that is overwritten exists at every moment.
    shutil.copytree(partial, folder, dirs_exist_ok=True, copy_function=os.replace)
    shutil.rmtree(partial)


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours, see :func:`is_ours`, unless somebody has put something else into it."""
    held = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    if held <= {LIST, *_read_list(folder)["files"]}:
        shutil.rmtree(folder)
