"""Checkpoints of the size of the adapter, each with a folder that peft can load."""

from lightning_flatlora.callbacks.adapter_checkpoint.callback import AdapterCheckpoint, SavesAdapters
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import load_adapter_checkpoint

__all__ = ["AdapterCheckpoint", "SavesAdapters", "load_adapter_checkpoint"]
