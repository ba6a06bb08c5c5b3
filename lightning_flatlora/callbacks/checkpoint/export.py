"""Adapters in peft's own format, of the values that a checkpoint holds."""

import copy
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_flatlora.callbacks.checkpoint.parts import hosts, prefix_of
from lightning_flatlora.lightning_names import MisconfigurationException


def save_adapters(module: nn.Module, state: Mapping[str, Any], folder: Path) -> None:
    """Write every adapter of a module, so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    Each adapter that is not called "default" has a subfolder, as peft makes them; where several parts of the module
    hold adapters, each part has one.

    Args:
        module: unwrapped, see :func:`parts.unwrapped`; it is changed a little, so it must be a copy.
        state: the values, by the module's names.
        folder: to write into.
    """
    found = hosts(module)
    for name, host in found.items():
        with_plain_configs(host)
        prefix = prefix_of(name)
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        place = folder if len(found) == 1 else folder / name
        if isinstance(host, PeftModel):
            host.save_pretrained(str(place), state_dict=own)
        else:
            _save_injected(host, own, place)


def _save_injected(host: Any, state: dict[str, Any], folder: Path) -> None:
    """What peft writes, of a module that is not wrapped in one of its models."""
    prefix = "base_model." if isinstance(host, BaseTuner) else "base_model.model."
    for name, config in host.peft_config.items():
        place = folder if name == "default" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(host, state_dict=state, adapter_name=name)
        own = {f"{prefix}{key}": _alone(value) for key, value in weights.items()}
        save_file(own, place / "adapter_model.safetensors", metadata={"format": "pt"})
        for_inference = copy.copy(config)
        for_inference.inference_mode = True
        for_inference.save_pretrained(str(place))


def _alone(value: Tensor) -> Tensor:
    """A tensor that shares no memory, which safetensors asks for."""
    return value.detach().clone().contiguous()


def with_plain_configs(host: Any) -> None:
    """Give an unwrapped module configs of plain lists and dicts, which JSON can write, as Hydra's can't."""
    host.peft_config = {name: _plain_config(config) for name, config in host.peft_config.items()}


def _plain_config(config: PeftConfig) -> PeftConfig:
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
    """Raise an error that names what JSON can't hold, if any.

    Args:
        module: unwrapped; it is changed a little, so it must be a copy.
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
