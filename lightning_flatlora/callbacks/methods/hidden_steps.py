"""Optimizer steps that no hook announces, so that they can't be taken at perturbed weights."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_flatlora.callbacks.patches import put_on_instance


def refuse_hidden_steps(trainer: Trainer, refuse: Callable[[Optimizer], None]) -> ExitStack:
    """Watch for steps that bypass the strategy, which is what calls ``on_before_optimizer_step``.

    An override of ``optimizer_step``, or a training_step in manual optimization, makes one by stepping the optimizer
    inside Lightning's own. Optimizers that are not PyTorch's (wrappers that keep one inside) can't be watched.

    Args:
        trainer: as fit starts; its optimizers are watched.
        refuse: called with the optimizer before the first such step is taken; it raises where that must not be.

    Returns:
        An ExitStack that ends the watch when it is closed.
    """
    original = trainer.strategy.optimizer_step
    # Steps of the strategy that are under way; one may take another inside.
    announced = 0

    def optimizer_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal announced
        announced += 1
        try:
            return original(*args, **kwargs)
        finally:
            announced -= 1

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not announced:
            refuse(optimizer)

    watch = ExitStack()
    watch.callback(put_on_instance(trainer.strategy, "optimizer_step", optimizer_step))
    for optimizer in trainer.optimizers:
        # A wrapper may inherit from Optimizer without calling its constructor, which creates this table.
        if "_optimizer_step_pre_hooks" in vars(optimizer):
            watch.callback(optimizer.register_step_pre_hook(before_step).remove)
    return watch
