"""How many optimizer steps a run takes, as far as this is known in advance."""

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_flatlora.lightning_names import callbacks_of, is_lightning


def horizon_problems(sized: str, trainer: Trainer, pl_module: LightningModule, is_driven: bool) -> list[str]:
    """Why the number of optimizer steps can't be known, as far as can be said before the loaders are set up.

    Args:
        sized: the schedule that needs the number, as the user wrote it.
        trainer: as fit starts.
        pl_module: the model.
        is_driven: whether the model is an FMLoRAModule, whose steps are known though its optimization is manual.
    """
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        return [no_end(sized)]
    # FMLoRAModule's optimization is manual, too, but its window says when it steps.
    own_steps = not pl_module.automatic_optimization and not is_driven
    changing = any(is_lightning(each, GradientAccumulationScheduler) for each in callbacks_of(trainer))
    if own_steps or changing:
        cause = "this module steps its optimizer itself" if own_steps else "the accumulation changes"
        return [f"{sized} spreads over the run, whose steps are not known as {cause}: set its total_steps"]
    return []


def no_end(sized: str) -> str:
    """What is wrong with a schedule over the whole run where the run has no end."""
    return (
        f"{sized} spreads over the whole run, and this run has no end: "
        "set its total_steps, or the Trainer's max_steps, or max_epochs with a loader of known length"
    )


def optimizer_steps(trainer: Trainer, window: int) -> float:
    """Optimizer steps of the whole run, infinite where nothing ends it or a loader does not know its length.

    Not ``trainer.estimated_stepping_batches``: before training it sets the loaders up too early for a resumed one to
    take its state, and under manual optimization it counts batches.

    Args:
        trainer: as training starts.
        window: batches of an optimizer step.
    """
    steps = math.inf
    if trainer.max_epochs not in (None, -1) and math.isfinite(trainer.num_training_batches):
        # Rounded up, because the last window of an epoch steps even if it is shorter.
        steps = math.ceil(trainer.num_training_batches / window) * _epochs(trainer)
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps


def _epochs(trainer: Trainer) -> int:
    """Epochs that train: without the one in which weight averaging refreshes BatchNorm's statistics."""
    epochs = trainer.max_epochs or 1
    for each in callbacks_of(trainer):
        if is_lightning(each, StochasticWeightAveraging):
            epochs = min(epochs, each.swa_end + 1)
    return max(epochs, 1)
