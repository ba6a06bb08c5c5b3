"""Adapters in peft's own format, of the values that a checkpoint holds."""

import copy
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_flatlora.callbacks.checkpoint.parts import found_factors, found_hosts, hosts, prefix_of
from lightning_flatlora.finders import litgpt_pairs
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.lora_pair import Finder


def save_adapters(module: nn.Module, state: Mapping[str, Any], folder: Path, finder: Finder | None = None) -> None:
    """Write every adapter of a module, so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    Each adapter that is not called "default" has a subfolder, as in peft. Where several parts of the module hold
    adapters, each part has a subfolder.

    Args:
        module: unwrapped, see :func:`parts.twin_of`; its configs are replaced, so it must be a copy.
        state: the values, by the module's names.
        folder: to write into.
        finder: of factors that are not peft's, which get a file of their own.
    """
    found = found_hosts(module, finder)
    modules = {**found, **hosts(module)}
    for name, host in modules.items():
        prefix = prefix_of(name)
        if not any(key.startswith(prefix) for key in state):
            raise MisconfigurationException(
                f"AdapterCheckpoint: the state_dict of {type(module).__name__} has no name that begins with "
                f"{prefix!r}, so the folder in peft's format would be empty: leave state_dict as Lightning has it, "
                "since the files hold no frozen weights anyway, or use Lightning's ModelCheckpoint"
            )
        of_host = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        place = folder if len(modules) == 1 else folder / name
        if name in found:
            factors = found_factors(host, finder)
            _save_factors({key: _alone(of_host[key]) for key in factors}, place, of_litgpt=finder is litgpt_pairs)
            continue
        with_plain_configs(host)
        if isinstance(host, PeftModel):
            host.save_pretrained(str(place), state_dict=of_host, save_embedding_layers=_save_embeddings(host))
        else:
            _save_injected(host, of_host, place)


def _save_injected(host: Any, state: dict[str, Any], folder: Path) -> None:
    """Write what peft would, for a module that is not wrapped in one of its models."""
    prefix = "base_model." if isinstance(host, BaseTuner) else "base_model.model."
    for name, config in host.peft_config.items():
        place = folder if name == "default" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(
            host, state_dict=state, adapter_name=name, save_embedding_layers=_save_embeddings(host)
        )
        named = {f"{prefix}{key}": _alone(value) for key, value in weights.items()}
        save_file(named, place / "adapter_model.safetensors", metadata={"format": "pt"})
        for_inference = copy.copy(config)
        # As peft's save_pretrained does, so that a loaded adapter is frozen unless is_trainable is given.
        for_inference.inference_mode = True
        for_inference.save_pretrained(str(place))


def _save_embeddings(host: nn.Module) -> bool | Literal["auto"]:
    """What peft is told about embeddings: to save them where it finds them adapted, or that there are none.

    It asks for them where an adapted layer is called lm_head, and transformers' speech models have none to give.
    """
    get_input_embeddings = getattr(host, "get_input_embeddings", None)
    if get_input_embeddings is not None:
        try:
            get_input_embeddings()
        except NotImplementedError:
            return False
    return "auto"


def _save_factors(factors: dict[str, Tensor], folder: Path, of_litgpt: bool) -> None:
    """Write factors by their names in the model: in the file that litgpt's scripts read, or as plain safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if of_litgpt:
        torch.save({"model": {name: value.cpu() for name, value in factors.items()}}, folder / "lit_model.pth.lora")
    else:
        save_file(factors, folder / "factors.safetensors", metadata={"format": "pt"})


def _alone(value: Tensor) -> Tensor:
    """A tensor that shares no memory with others, as safetensors requires."""
    return value.detach().clone().contiguous()


def with_plain_configs(host: Any) -> None:
    """Give an unwrapped module configs of plain lists and dicts, since JSON can't write those of Hydra."""
    host.peft_config = {name: _plain_config(config) for name, config in host.peft_config.items()}


def _plain_config(config: PeftConfig) -> PeftConfig:
    # A shallow copy, because the user's own config must keep its types.
    twin = copy.copy(config)
    for field in fields(config):
        value = getattr(config, field.name, None)
        if isinstance(value, Mapping | Sequence | Set):
            setattr(twin, field.name, _plain(value))
    return twin


def _plain(value: Any) -> Any:
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Set):
        return {_plain(each) for each in value}
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return value


def check_configs(module: nn.Module) -> None:
    """Raise an error that names what JSON can't hold, if there is anything.

    Args:
        module: unwrapped; its configs are replaced, so it must be a copy.
    """
    for host in hosts(module).values():
        with_plain_configs(host)
        configs: dict[str, PeftConfig] = host.peft_config  # type: ignore[assignment]
        for name, config in configs.items():
            for field, value in config.to_dict().items():
                try:
                    json.dumps(list(value) if isinstance(value, set) else value)
                except (TypeError, ValueError) as error:
                    raise MisconfigurationException(
                        f"AdapterCheckpoint: peft can't write the config of adapter {name!r}, as its {field} is "
                        f"{value!r} ({error}): give it plain numbers, strings, lists and dicts"
                    ) from error
