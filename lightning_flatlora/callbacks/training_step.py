"""A training step as Lightning runs it: its loss, its accumulation window, and the number of steps of a run."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_flatlora.callbacks.both_lightnings import callbacks_of, is_lightning

# What a step can do instead of returning None if others wait for its gradient.
ZERO_LOSS = "return a loss of zero that depends on the parameters, as 0 * output.sum()"


def loss_of(output: Any, source: str) -> Tensor | None:
    """Find the loss in a named step's output: a tensor, a mapping with "loss", or None for a skipped batch.

    Raises:
        TypeError: any other output.
    """
    if output is None:
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"{source} must return the loss, a dict with 'loss', or None, got {type(output).__name__}")
    return loss


def leave_batch_out(trainer: Trainer, name: str) -> None:
    """Warn that a batch has a loss in its first pass but none in its second, in which the named method gave None.

    This happens if E is large and a step guards itself against losses that are not finite. Lightning also leaves out
    batches without a loss.

    Raises:
        RuntimeError: other ranks would wait for this batch's gradient, or a loss scaler would refuse the step.
    """
    what = f"{name} returned None in the second pass of a step, but a loss in the first"
    scales = trainer.lightning_module.automatic_optimization and getattr(trainer.precision_plugin, "scaler", None)
    if trainer.world_size > 1 or scales:
        raise RuntimeError(f"{what}. Other ranks or the loss scaler would wait for its gradient: {ZERO_LOSS}")
    rank_zero_warn(f"{what}: the batch is left out. If this happens often, rho may be too large")


def takes_passes_itself(module: LightningModule) -> bool:
    """Say whether a module is an FMLoRAModule, under either name of Lightning."""
    return getattr(module, "_takes_passes_itself", False)


def window_of(trainer: Trainer) -> int:
    """Return the number of batches per optimizer step, as the trainer or an FMLoRAModule accumulates them."""
    module: Any = trainer.lightning_module
    return module.accumulate_grad_batches if takes_passes_itself(module) else trainer.accumulate_grad_batches


def ends_window(trainer: Trainer) -> bool:
    """Say whether a batch is the last of its accumulation window, which may be shorter at the end of an epoch."""
    return (trainer.fit_loop.batch_idx + 1) % window_of(trainer) == 0 or trainer.is_last_batch


def horizon_problems(argument: str, trainer: Trainer, module: LightningModule) -> list[str]:
    """Say why the number of optimizer steps, which a schedule needs, can't be known, whatever the loaders give."""
    # FMLoRAModule's optimization is manual too, but its window determines its steps.
    own_steps = not module.automatic_optimization and not takes_passes_itself(module)
    changing = any(is_lightning(each, GradientAccumulationScheduler) for each in callbacks_of(trainer))
    if own_steps or changing:
        cause = "this module steps its optimizer itself" if own_steps else "the accumulation changes"
        return [f"{argument} spreads over the run, whose length is unknown as {cause}: set its total_steps"]
    return []


def optimizer_steps(trainer: Trainer) -> float:
    """Count the optimizer steps of the whole run, as training starts; infinite if the length is not known.

    Not ``trainer.estimated_stepping_batches``: before training it sets the loaders up too early for a resumed loader to
    take its state, and under manual optimization it counts batches.
    """
    steps, epochs = math.inf, trainer.max_epochs or 1
    for each in callbacks_of(trainer):
        # SWA adds an epoch, in which it only refreshes BatchNorm's statistics.
        if is_lightning(each, StochasticWeightAveraging):
            epochs = min(epochs, each.swa_end + 1)
    if epochs != -1 and math.isfinite(trainer.num_training_batches):
        # Rounded up, because an epoch's last window takes a step even if it is shorter.
        steps = math.ceil(trainer.num_training_batches / window_of(trainer)) * epochs
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps
