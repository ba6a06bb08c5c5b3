"""What the callbacks must know of an FMLoRAModule, which takes its passes and accumulates its batches itself."""

from lightning.pytorch import Callback, Trainer

from lightning_flatlora.lightning_names import callback_of


class ModulePasses(Callback):
    """Marks the callback of an FMLoRAModule, the module that takes a step's passes itself.

    Attributes:
        window: batches of an optimizer step, as the module accumulates them.
    """

    window: int


def module_passes_of(trainer: Trainer) -> ModulePasses | None:
    """The mark of an FMLoRAModule; None where the model is another module."""
    # By this mark and not by FMLoRAModuleDriver, whose file imports the methods that ask.
    return callback_of(trainer, ModulePasses)


def window_of(trainer: Trainer) -> int:
    """Batches of an optimizer step, as the trainer or an FMLoRAModule accumulates them."""
    passes = module_passes_of(trainer)
    return trainer.accumulate_grad_batches if passes is None else passes.window
