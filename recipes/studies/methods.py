"""The methods that the demos and the benchmarks compare."""

import lightning as L

from lightning_flatlora import EFMLoRA, FMLoRA

OURS = ("LoRA", "EFMLoRA", "FMLoRA")
"""Titles of what the benchmarks compare."""


def callbacks_of(title: str, rho: float) -> list[L.Callback]:
    """Return what a method adds to plain LoRA, new for each Trainer; nothing if it is no callback.

    Example:
        >>> [type(callback).__name__ for callback in callbacks_of("EFMLoRA", 0.5)], callbacks_of("LoRA", 0.5)
        (['EFMLoRA'], [])
    """
    if title == "EFMLoRA":
        return [EFMLoRA(rho)]
    return [FMLoRA(rho)] if title == "FMLoRA" else []
