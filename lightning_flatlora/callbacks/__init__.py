"""Lightning callbacks: the methods, checkpoints of adapters, and the monitor of flatness."""

from lightning_flatlora.callbacks.checkpoint.callback import AdapterCheckpoint
from lightning_flatlora.callbacks.checkpoint.loading import load_adapter_checkpoint
from lightning_flatlora.callbacks.flatness_monitor import FlatnessMonitor
from lightning_flatlora.callbacks.methods.efmlora import EFMLoRA
from lightning_flatlora.callbacks.methods.fmlora import FMLoRA

__all__ = ["AdapterCheckpoint", "EFMLoRA", "FMLoRA", "FlatnessMonitor", "load_adapter_checkpoint"]
