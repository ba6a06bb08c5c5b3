"""This process's index within a run, and the values of the others."""

from typing import Any

import torch.distributed as dist


def gathered(value: Any) -> list[Any]:
    """Return every process's value, in rank order, on each of them; all must call it.

    Example:
        >>> gathered("alone")
        ['alone']
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return this process's index among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
