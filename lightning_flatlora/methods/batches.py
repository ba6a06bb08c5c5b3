"""Batches that a step may take apart, or write into."""

import copy
import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor


def copied_batch(batch: Any) -> Any:
    """Copy the tensors of a batch into new containers, so that no pass sees what another has done to them.

    Containers are dicts and other mappings, lists, tuples, dataclasses, and objects with a method ``to``.

    Args:
        batch: whatever a data loader gives.

    Raises:
        RuntimeError: the batch is an iterator, or holds one, which the first pass would leave empty.

    Example:
        >>> batch = {"x": 1, "more": [2]}
        >>> copied = copied_batch(batch)
        >>> batch.pop("x"), batch["more"].pop(), copied
        (1, 2, {'x': 1, 'more': [2]})
    """
    if isinstance(batch, Tensor):
        copied = batch.clone()
        # A user may have put attributes on it.
        copied.__dict__.update(batch.__dict__)
        return copied
    if isinstance(batch, Iterator):
        raise RuntimeError(
            f"a second pass over a batch needs the batch again, and a {type(batch).__name__} can be read only once: "
            "let the loader give lists"
        )
    if callable(batch):
        return batch
    if type(batch) in (list, tuple):
        return type(batch)(map(copied_batch, batch))
    if isinstance(batch, tuple) and hasattr(batch, "_make"):  # a named tuple
        return batch._make(map(copied_batch, batch))
    if isinstance(batch, MutableMapping):
        own = copy.copy(batch)
        for key, value in batch.items():
            own[key] = copied_batch(value)
        return own
    # The other objects that Lightning moves to a device.
    if dataclasses.is_dataclass(batch) or hasattr(batch, "to"):
        return _with_own_attributes(batch)
    return batch


def _with_own_attributes(thing: Any) -> Any:
    own = copy.copy(thing)
    # A class that says itself how it is copied has seen to what it holds.
    if own is thing or hasattr(type(thing), "__copy__") or not hasattr(thing, "__dict__"):
        return own
    for name, value in vars(thing).items():
        # Not by setattr, which frozen dataclasses refuse.
        vars(own)[name] = copied_batch(value)
    return own
