"""The methods as callbacks: when the weights are perturbed, and from which gradient."""

from lightning_flatlora.callbacks.methods.efmlora import EFMLoRA
from lightning_flatlora.callbacks.methods.fmlora import FMLoRA

__all__ = ["EFMLoRA", "FMLoRA"]
