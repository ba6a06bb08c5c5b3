"""A training step as Lightning runs it: its batch, its loss, and whether an optimizer step follows."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def own_containers(batch: Any, of_tensor: Callable[[Tensor], Any] = lambda tensor: tensor) -> Any:
    """The same tensors in new containers, so that what a pass pops or replaces is still there for the next one.

    Containers are dicts and other mappings, lists, tuples, dataclasses, and objects with a method ``to``.

    Args:
        batch: whatever a data loader gives.
        of_tensor: what takes a tensor's place, such as a copy; the tensor itself where it is left out.

    Raises:
        RuntimeError: the batch is an iterator, or holds one, which the first pass would leave empty.

    Example:
        >>> batch = {"x": 1, "more": [2]}
        >>> own = own_containers(batch)
        >>> batch.pop("x"), batch["more"].pop(), own
        (1, 2, {'x': 1, 'more': [2]})
    """
    own_of = partial(own_containers, of_tensor=of_tensor)
    if isinstance(batch, Tensor):
        return of_tensor(batch)
    if isinstance(batch, Iterator):
        raise RuntimeError(
            f"a second pass over a batch needs the batch again, and a {type(batch).__name__} can be read only once: "
            "let the loader give lists"
        )
    if callable(batch):
        return batch
    if type(batch) in (list, tuple):
        return type(batch)(map(own_of, batch))
    if isinstance(batch, tuple) and hasattr(batch, "_make"):  # a named tuple
        return batch._make(map(own_of, batch))
    if isinstance(batch, MutableMapping):
        own = copy.copy(batch)
        for key, value in batch.items():
            of_value = own_of(value)
            # Some mappings can't be written, and most values are tensors.
            if of_value is not value:
                own[key] = of_value
        return own
    # The other objects that Lightning moves to a device.
    if dataclasses.is_dataclass(batch) or hasattr(batch, "to"):
        return _own_attributes(batch, own_of)
    return batch


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors that :func:`own_containers` reaches.

    Example:
        >>> import torch
        >>> len(tensors_in({"x": torch.ones(2), "more": [torch.ones(1), "a text"]}))
        2
    """
    found: list[Tensor] = []
    own_containers(batch, found.append)
    return found


def _own_attributes(thing: Any, own_of: Callable[[Any], Any]) -> Any:
    own = copy.copy(thing)
    # A class that says itself how it is copied has seen to what it holds.
    if own is thing or hasattr(type(thing), "__copy__") or not hasattr(thing, "__dict__"):
        return own
    for name, value in vars(thing).items():
        # Not by setattr, which frozen dataclasses refuse.
        vars(own)[name] = own_of(value)
    return own


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
