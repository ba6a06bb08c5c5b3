"""TEMPORARY."""

from lightning_flatlora.callbacks.methods.second_pass import SecondPass as Replay

__all__ = ["Replay"]
