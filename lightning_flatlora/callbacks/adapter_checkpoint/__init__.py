"""Checkpoints of the size of the adapter, each with a folder that peft can load."""
