"""Clipping by value on ranks that hold no gradient."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_flatlora.callbacks.two_passes import put_on_instance


def skip_clipping_without_gradients(trainer: Trainer) -> Callable[[], None]:
    """Let a rank whose shards hold no trained value clip nothing, where PyTorch raises an internal error.

    FSDP1 cuts a unit's values into one piece a rank; LoRA's small factors may all lie in one piece. Clipping by value
    looks at each entry alone, so leaving it out there changes nothing.

    Returns:
        A function that puts Lightning's own way back.
    """
    plugin: Any = trainer.precision_plugin
    clip = plugin.clip_grad_by_value

    def clip_grad_by_value(optimizer: Any, clip_val: Any) -> None:
        if any(parameter.grad is not None for parameter in plugin.main_params(optimizer)):
            clip(optimizer, clip_val)

    return put_on_instance(plugin, "clip_grad_by_value", clip_grad_by_value)
