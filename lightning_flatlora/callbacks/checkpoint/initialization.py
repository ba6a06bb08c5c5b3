"""Bases that peft has changed while it made an adapter, in a way that is not the same the next time."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_flatlora.callbacks.checkpoint.changes import listed
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, hosts, prefix_of

# Drawn at random, or made from data or gradients. Plain PiSSA and OLoRA come out the same from the same base.
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
                places.append(f"{prefix_of(host_name)}{prefix_of(name)}base_layer.weight")
    return [name for name, entry in entries.items() if entry.kind is Kind.BASE and name.startswith(tuple(places))]


def warn_of_rewritten_base(names: list[str]) -> None:
    """Say that a checkpoint file holds them, and that the folder beside it can't."""
    rank_zero_warn(
        f"AdapterCheckpoint: peft rewrote {listed(names)} of the base when it made the adapter, as init_lora_weights "
        "says, and would rewrite it otherwise the next time. So the .ckpt files hold it, and a run resumes from them. "
        "The folders hold the adapter alone, which peft would put on another base: to use it elsewhere, load the .ckpt "
        "by load_adapter_checkpoint, and merge the adapter by merge_and_unload"
    )


def _configs_of(host: nn.Module) -> dict[str, Any]:
    configs = getattr(host, "peft_config", {})
    return {name: config for name, config in configs.items() if hasattr(config, "init_lora_weights")}
