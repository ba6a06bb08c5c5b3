"""A training step as Lightning runs it: its loss, and whether an optimizer step follows."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor


def loss_of(output: object, source: str) -> Tensor | None:
    """The loss in the output of a step: a tensor, a mapping with "loss", or None for a skipped batch.

    Args:
        output: what the step returned.
        source: the step's name, for the error.

    Raises:
        TypeError: the output is something else.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None and not isinstance(output, Mapping):
        return None
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{source} must return the loss as a tensor, a dict with the key 'loss', or None to skip the batch; "
            f"got {type(output).__name__}"
        )
    return loss


def ends_window(trainer: Trainer, batch_idx: int, accumulate_grad_batches: int) -> bool:
    """Whether a batch is the last of its accumulation window, which may be shorter at the end of an epoch."""
    return (batch_idx + 1) % accumulate_grad_batches == 0 or trainer.is_last_batch


def takes_no_step(trainer: Trainer) -> bool:
    """Whether batches only update BatchNorm's statistics now, as in the epoch that weight averaging (SWA) adds."""
    # Private, but Lightning says it nowhere else: StochasticWeightAveraging sets it for the epoch that it adds.
    return bool(trainer.fit_loop._skip_backward)


def leave_batch_out(trainer: Trainer, name: str) -> None:
    """Warn that a batch with a loss in its first pass has none in its second, and so leaves no gradient.

    A step that guards itself against losses which are not finite does so where E is large. Lightning leaves a batch
    without a loss out as well.

    Args:
        trainer: that runs the step.
        name: of the method that returned None.

    Raises:
        RuntimeError: other ranks would wait for this batch's gradient, or a loss scaler would refuse the step.
    """
    what = f"{name} returned None in the second pass of a step, and a loss in the first"
    remedy = "return a loss of zero that depends on the parameters, as 0 * output.sum()"
    if trainer.world_size > 1:
        raise RuntimeError(f"{what}, and the other ranks would wait for its gradient forever: {remedy}")
    if trainer.lightning_module.automatic_optimization and getattr(trainer.precision_plugin, "scaler", None):
        raise RuntimeError(f"{what}, and the loss scaler refuses a step without gradients: {remedy}")
    rank_zero_warn(f"{what}: the batch is left out. If this comes often, rho may be too large")
