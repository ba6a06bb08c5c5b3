"""Bases that peft has changed while it made an adapter, in a way that is not the same the next time."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_flatlora.callbacks.checkpoint.changes import listed
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, hosts, prefix_of

# Drawn at random, or made from data or gradients. Plain PiSSA, OLoRA and LoftQ come out the same from the same base.
_DIFFER_EACH_TIME = ("pissa_niter", "corda", "lora_ga")


def rewritten_base(module: nn.Module, entries: Mapping[str, Entry]) -> list[str]:
    """Names of the base's entries which the loader of the base, and peft after it, would not give again.

    Args:
        module: what :func:`parts.twin_of` gives.
        entries: of its state dict.
    """
    places = []
    for host_name, host in hosts(module).items():
        inits = {name: str(config.init_lora_weights) for name, config in _configs_of(host).items()}
        rewriting = {name for name, init in inits.items() if init.startswith(_DIFFER_EACH_TIME)}
        for name, layer in host.named_modules():
            if isinstance(layer, LoraLayer) and rewriting & set(layer.r):
                places.append(f"{prefix_of(host_name)}{prefix_of(name)}base_layer.")
    return [name for name, entry in entries.items() if entry.kind is Kind.BASE and name.startswith(tuple(places))]


def warn_of_rewritten_base(names: list[str]) -> None:
    """Say that a checkpoint file holds them, and that the folder beside it can't."""
    rank_zero_warn(
        f"AdapterCheckpoint: {listed(names)} of the base were rewritten when peft made the adapter, as its "
        "init_lora_weights says, and a new start would give others. So they are in the .ckpt files, from which a run "
        "resumes. The folders hold the adapter alone, and peft would put it on another base: to use it elsewhere, load "
        "the .ckpt by load_adapter_checkpoint, and merge_and_unload the adapter"
    )


def _configs_of(host: nn.Module) -> dict[str, Any]:
    configs = getattr(host, "peft_config", {})
    return {name: config for name, config in configs.items() if hasattr(config, "init_lora_weights")}
