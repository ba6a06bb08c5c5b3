"""What FlatnessMonitor asks of the method beside it, all in one place."""

from typing import Any

from lightning.pytorch import Trainer

from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.fmlora import FMLoRA
from lightning_flatlora.callbacks.fmlora_module import FMLoRAModuleCallback
from lightning_flatlora.compat import callback_of, callbacks_of


def method_of(trainer: Trainer) -> Any:
    """Find the paper's method in this trainer, or None.

    Of it the monitor takes ``perturbation``, ``finder``, ``adapter_name`` and ``current_rho``. EFMLoRA, which
    also schedules an FMLoRAModule, comes before the others.
    """
    first = callback_of(trainer, EFMLoRA) or callback_of(trainer, FMLoRA)
    return first or callback_of(trainer, FMLoRAModuleCallback)


def has_average(method: Any) -> bool:
    """Say whether a method keeps an average perturbation."""
    return isinstance(method, EFMLoRA)


def count_averages(trainer: Trainer) -> int:
    """Count the average perturbations in this trainer: EFMLoRA keeps one for each optimizer."""
    averages = 0
    for callback in callbacks_of(trainer):
        if isinstance(callback, EFMLoRA):
            averages += sum(bool(method.pairs) for method in callback.methods)
    return averages
