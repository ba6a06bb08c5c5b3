"""LoRA adapters in folders, perhaps somebody else's: read here before peft or transformers sees them."""

import dataclasses
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor
from transformers.utils import find_adapter_config_file

from recipes.data.foreign import read_json

_FIELDS: dict[tuple[type, ...], str] = {
    (str,): "peft_type task_type peft_version base_model_name_or_path revision bias megatron_core",
    (bool,): "inference_mode fan_in_fan_out use_rslora use_dora use_qalora lora_bias ensure_weight_tying",
    (int,): "r qalora_group_size",
    (int, float): "lora_alpha lora_dropout",
    (list,): "modules_to_save target_parameters layer_replication alora_invocation_tokens",
    (list, str): "target_modules exclude_modules layers_pattern",
    (list, int): "layers_to_transform",
    (list, dict): "trainable_token_indices",
    (bool, str): "init_lora_weights",
    (dict,): "auto_mapping rank_pattern alpha_pattern loftq_config eva_config corda_config lora_ga_config "
    "arrow_config velora_config monteclora_config kasa_config use_bdlora",
}
"""The fields that are plain data, by their types.

Without ``megatron_config``, for which peft 0.18 imports the module that ``megatron_core`` names.
"""
_KINDS: dict[str, tuple[type, ...]] = {}
for _kinds, _names in _FIELDS.items():
    _KINDS.update(dict.fromkeys(_names.split(), _kinds))
_INSTALLED = {field.name for field in dataclasses.fields(LoraConfig)}


def read_config(folder: Path) -> LoraConfig:
    """Return the configuration of a LoRA adapter; give it to peft, which would otherwise read the file itself.

    Raises:
        MisconfigurationException: the folder holds none, or one of another kind, or one that may run code.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise MisconfigurationException(f"{folder} is not an adapter's folder: it has no {path.name}")
    found = read_json(path)
    given = found if isinstance(found, dict) else {}
    kind = given.get("peft_type")
    if kind != "LORA":
        raise MisconfigurationException(f"{folder}: its {path.name} must say peft_type LORA, got {kind!r:.100}")
    fields, others = {}, {}
    for name, value in given.items():
        is_known = name in _KINDS and name in _INSTALLED
        if is_known and isinstance(value, _KINDS[name]) and _is_plain(value):
            fields[name] = value
        elif value or (is_known and value is not None):  # other versions of peft write fields that are off
            others[name] = value
    if others:
        raise MisconfigurationException(
            f"{path}: only what the installed peft knows as plain data of LoRA is taken from an adapter, since the "
            f"rest may run code; got {others!r:.300}. Remove it there, or update peft if the field is new"
        )
    try:
        return LoraConfig(**fields)
    except Exception as error:  # peft checks some combinations, and stumbles over others
        raise MisconfigurationException(f"{path} can't be used by peft, take one that it wrote: {error!r}") from error


def _is_plain(value: Any, levels: int = 2) -> bool:
    """Return whether a value of JSON has no lists or dicts but those of a few levels."""
    if not isinstance(value, list | dict):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_plain(part, levels - 1) for part in parts)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's weights by name, on the CPU; a pickle is read as weights only, by peft's default.

    Raises:
        MisconfigurationException: the folder has none, or what it has can't be read.
    """
    files = (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME)
    # Otherwise peft would look for them on the Hub, in a repository of the folder's name.
    if not any(file.is_file() for file in files):
        raise MisconfigurationException(f"{folder} holds no weights of an adapter: copy {files[0].name} there")
    try:
        saved: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # the readers of safetensors and pickles raise types without a common base
        raise MisconfigurationException(
            f"the weights in {folder} can't be read, copy them again: {error!r:.300}"
        ) from error
    if not isinstance(saved, dict) or not all(isinstance(weight, Tensor) for weight in saved.values()):
        raise MisconfigurationException(f"the weights in {folder} must be tensors by name, as peft saves them")
    return saved


def check_base(source: str) -> None:
    """Refuse a base whose folder or repository holds an adapter that :func:`read_config` refuses.

    transformers would load that adapter with the base.
    """
    found = find_adapter_config_file(source)
    if found is not None:
        read_config(Path(found).parent)
