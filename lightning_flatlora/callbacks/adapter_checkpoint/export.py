"""Write the folder beside a checkpoint in peft's own format, and know which files on the disk are ours.

Each folder holds a small list of the files that were written into it. Nothing else is ever deleted.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_flatlora.callbacks.adapter_checkpoint import contents
from lightning_flatlora.finders import litgpt_pairs
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.pairs.lora_pair import Finder

LIST = ".adapter_checkpoint.json"
"""In each folder: the name of its checkpoint, and the files that we wrote."""


def save_adapters(module: nn.Module, state: Mapping[str, Any], folder: Path, finder: Finder | None = None) -> None:
    """Write every adapter of a module, so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    Each adapter that is not called "default" has a subfolder, as in peft. If several parts of the module hold adapters,
    each part has a subfolder.

    Args:
        module: holds the adapters.
        state: the values, by the module's clean names.
        folder: to write into.
        finder: of factors that are not peft's, which get a file of their own.
    """
    with contents.unwrapped(module):
        modules, of_peft = contents.hosts_of(module, finder), contents.hosts(module)
        for name, host in modules.items():
            prefix = contents.prefix_of(name)
            of_host = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if not of_host:
                raise MisconfigurationException(
                    f"AdapterCheckpoint: the state_dict of {type(module).__name__} has no name that begins with "
                    f"{prefix!r}, so the folder in peft's format would be empty: leave state_dict as Lightning has it, "
                    "since the files hold no frozen weights anyway, or use Lightning's ModelCheckpoint"
                )
            place = folder if len(modules) == 1 else folder / name
            if name in of_peft:
                _save_of_peft(host, of_host, place)
            else:
                # The name and the form that litgpt's scripts read, or plain safetensors.
                file = "lit_model.pth.lora" if finder is litgpt_pairs else "factors.safetensors"
                _save_tensors({key: of_host[key] for key in contents.found_factors(host, finder)}, place / file)


def _save_of_peft(host: Any, state: dict[str, Any], folder: Path) -> None:
    for name, config in host.peft_config.items():
        _check_config(name, config)
    embeddings = _save_embeddings(host)
    if isinstance(host, PeftModel):
        host.save_pretrained(str(folder), state_dict=state, save_embedding_layers=embeddings)
        return
    # What peft would write, for a module that is not wrapped in one of its models.
    prefix = "base_model." if isinstance(host, BaseTuner) else "base_model.model."
    for name, config in host.peft_config.items():
        place = folder if name == "default" else folder / name
        weights = get_peft_model_state_dict(host, state, name, save_embedding_layers=embeddings)
        _save_tensors({f"{prefix}{key}": value for key, value in weights.items()}, place / "adapter_model.safetensors")
        for_inference = copy.copy(config)
        # As peft's save_pretrained does, so that a loaded adapter is frozen unless is_trainable is given.
        for_inference.inference_mode = True
        for_inference.save_pretrained(str(place))


def _check_config(name: str, config: PeftConfig) -> None:
    for field, value in config.to_dict().items():
        try:
            json.dumps(list(value) if isinstance(value, set) else value)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"AdapterCheckpoint: peft can't write the config of adapter {name!r}, as its {field} is {value!r} "
                f"({error}): give it plain numbers, strings, lists and dicts"
            ) from error


def _save_embeddings(host: nn.Module) -> bool | Literal["auto"]:
    """Tell peft about embeddings: to save them if it finds them adapted, or that there are none.

    It asks for them if an adapted layer is called lm_head, and transformers' speech models have none to give.
    """
    try:
        getattr(host, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return False
    return "auto"


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since safetensors refuses tensors that share memory.
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    if file.suffix == ".safetensors":
        save_file(copies, file, metadata={"format": "pt"})
    else:
        torch.save({"model": copies}, file)


# -- the place on the disk


def adapter_folder(checkpoint: Path) -> Path:
    """Give the folder of a checkpoint: its own if there is one, or a free name.

    It is called like the file without its extension, or, if something that is not ours has that name, the same with
    "-adapter" behind it.

    Example:
        >>> adapter_folder(Path("runs/epoch=0-step=10.ckpt")).name
        'epoch=0-step=10'
    """
    return next(folder for folder in folder_names(checkpoint) if is_free(folder) or is_ours(folder, checkpoint))


def folder_names(checkpoint: Path) -> Iterator[Path]:
    """Give the possible names of a checkpoint's folder, the wanted one first."""
    if checkpoint.stem != checkpoint.name:
        yield checkpoint.with_name(checkpoint.stem)
    yield checkpoint.with_name(f"{checkpoint.stem}-adapter")
    for number in count(2):
        yield checkpoint.with_name(f"{checkpoint.stem}-adapter-{number}")


def is_free(folder: Path) -> bool:
    """Report whether nothing is there, or an empty folder."""
    if folder.is_symlink():
        return False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def is_ours(folder: Path, checkpoint: Path) -> bool:
    """Report whether we wrote a folder for a checkpoint, or made a link of both to another checkpoint of ours."""
    if not (folder / LIST).is_file():
        return False
    if folder.is_symlink():
        return checkpoint.is_symlink()
    return bool(_listed(folder)["checkpoint"] == checkpoint.name)


def _listed(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / LIST).read_text())
    return content


def aside(path: Path) -> Path:
    """Give a hidden name beside a file or folder, which only we use, for what is not complete yet."""
    return path.with_name(f".{path.name}.adapter-checkpoint-partial")


def begin_folder(folder: Path) -> Path:
    """Make an empty hidden folder beside the one to be written, which is moved into place once it is complete."""
    partial = aside(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, folder: Path, checkpoint: Path) -> None:
    """Move a written folder to its place; files of ours that are there already are replaced one by one.

    Args:
        partial: what :func:`begin_folder` gave, filled.
        folder: the place, of ours or free.
        checkpoint: the file that it belongs to, which is written after it.
    """
    if folder.is_symlink():
        folder.unlink()
    files = [str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()]
    before = [] if is_free(folder) else _listed(folder)["files"]
    old = [name for name in before if name not in files]
    # The list is written before the files. A file that is listed but missing does no harm, whereas one that is there
    # but not listed would never be deleted.
    (partial / LIST).write_text(json.dumps({"checkpoint": checkpoint.name, "files": [*files, *old]}, indent=1))
    if is_free(folder):
        partial.rename(folder)
        return
    for name in [LIST, *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # One by one, so that the folder of a checkpoint that is overwritten exists at every moment.
        (partial / name).replace(folder / name)
    _unlink(folder, old)
    shutil.rmtree(partial)


def remove_folder(folder: Path) -> None:
    """Delete what we wrote, and the folder if nothing else is in it.

    Args:
        folder: of ours, see :func:`is_ours`; or free.
    """
    if folder.is_symlink():
        folder.unlink()
    elif not is_free(folder):
        _unlink(folder, [*_listed(folder)["files"], LIST])
        if is_free(folder):
            folder.rmdir()


def _unlink(folder: Path, files: list[str]) -> None:
    for name in files:
        # The list is a file that anybody may have edited, so nothing outside of the folder is ever deleted.
        if ".." in Path(name).parts or Path(name).is_absolute():
            continue
        (folder / name).unlink(missing_ok=True)
        for parent in (folder / name).parents:
            if parent == folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


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
