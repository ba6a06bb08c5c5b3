"""FlatnessMonitor, which measures flatness while a model trains and leaves the training undisturbed."""

from lightning_flatlora.callbacks.monitor.flatness_monitor import FlatnessMonitor

__all__ = ["FlatnessMonitor"]
