"""Lightning callbacks: the methods, checkpoints of adapters, and the monitor of flatness."""

from lightning_flatlora.callbacks.checkpoint import AdapterCheckpoint, load_adapter_checkpoint
from lightning_flatlora.callbacks.methods import EFMLoRA, FMLoRA
from lightning_flatlora.callbacks.monitor import FlatnessMonitor

__all__ = ["AdapterCheckpoint", "EFMLoRA", "FMLoRA", "FlatnessMonitor", "load_adapter_checkpoint"]
