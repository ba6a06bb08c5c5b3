"""The methods that the demos and the sweeps compare."""

import lightning as L

from lightning_flatlora import EFMLoRA, FMLoRA

# FMLoRAModule is FMLoRA in manual optimization: each recipe has one, whose name ends in FM.
TITLES = {"lora": "LoRA", "efmlora": "EFMLoRA", "fmlora": "FMLoRA", "fmlora_manual": "FMLoRAModule"}
"""By the names that configurations have, and rows of results."""

OURS = ("LoRA", "EFMLoRA", "FMLoRA")
"""Titles of what the benchmarks compare."""


def callbacks_of(title: str, rho: float) -> list[L.Callback]:
    """What a method adds to plain LoRA, new for each Trainer; nothing if it is no callback.

    Example:
        >>> [type(callback).__name__ for callback in callbacks_of("EFMLoRA", 0.5)], callbacks_of("LoRA", 0.5)
        (['EFMLoRA'], [])
    """
    if title == "EFMLoRA":
        return [EFMLoRA(rho)]
    return [FMLoRA(rho)] if title == "FMLoRA" else []
