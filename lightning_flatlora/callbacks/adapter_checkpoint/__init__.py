"""Checkpoints as small as the adapter, each with a folder that peft can load."""
