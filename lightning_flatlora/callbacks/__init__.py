"""Lightning callbacks: the methods, checkpoints of adapters, jobs that come back, and the monitor of flatness."""

from lightning_flatlora.callbacks.adapter_checkpoint.callback import AdapterCheckpoint
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import load_adapter_checkpoint
from lightning_flatlora.callbacks.flatness_monitor import FlatnessMonitor
from lightning_flatlora.callbacks.fmlora import EFMLoRA, FMLoRA
from lightning_flatlora.callbacks.requeue import Requeue

__all__ = ["AdapterCheckpoint", "EFMLoRA", "FMLoRA", "FlatnessMonitor", "Requeue", "load_adapter_checkpoint"]
