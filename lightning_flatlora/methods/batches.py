"""Batches that a step may take apart."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor


def own_containers(batch: Any, of_tensor: Callable[[Tensor], Any] = lambda tensor: tensor) -> Any:
    """Give the same tensors in new containers, so that what a pass pops or replaces is still there for the next one.

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


def clone_with_attributes(tensor: Tensor) -> Tensor:
    """Copy a batch's tensor, with the attributes that a user has put on it."""
    copied = tensor.clone()
    copied.__dict__.update(tensor.__dict__)
    return copied


def _own_attributes(thing: Any, own_of: Callable[[Any], Any]) -> Any:
    own = copy.copy(thing)
    # A class that says itself how it is copied has seen to what it holds.
    if own is thing or hasattr(type(thing), "__copy__") or not hasattr(thing, "__dict__"):
        return own
    for name, value in vars(thing).items():
        # Not by setattr, which frozen dataclasses refuse.
        vars(own)[name] = own_of(value)
    return own
