"""A training step as Lightning runs it: its batch, its loss, and whether an optimizer step follows."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def own_containers(batch: Any) -> Any:
    """The same tensors in new dicts, lists and tuples, so that a pass that pops a key takes nothing from the next one.

    The tensors are not copied: the next pass sees what a pass writes into them.

    Example:
        >>> batch = {"x": 1, "more": [2]}
        >>> own = own_containers(batch)
        >>> batch.pop("x"), batch["more"].pop(), own
        (1, 2, {'x': 1, 'more': [2]})
    """
    # No subclasses: a named tuple, for example, can't be built from an iterable.
    if type(batch) in (list, tuple):
        return type(batch)(map(own_containers, batch))
    if type(batch) is dict:
        return {key: own_containers(value) for key, value in batch.items()}
    # Such as transformers' BatchEncoding.
    if isinstance(batch, MutableMapping):
        return copy.copy(batch)
    return batch


def loss_of(output: Any, source: str) -> Tensor | None:
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
