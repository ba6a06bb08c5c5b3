"""What an object leads to through its attributes and containers, such as random generators."""

import functools
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
MOST_ENTRIES = 10_000
"""A container with more entries is taken to hold data, and is not entered."""
_MOST_SEARCHED = 100_000
"""How many objects are searched, the nearest first."""
_PLAIN = {int, float, complex, bool, str, bytes, type(None)}
_TRAINING = {"lightning", "pytorch_lightning", "lightning_flatlora"}
"""Packages whose objects are not entered: from a trainer, or a part of one, all of the training could be reached."""


def generators_in(sources: Iterable[Any]) -> list[Any]:
    """Every random generator that :func:`objects_in` finds.

    Example:
        >>> generator = random.Random(0)
        >>> generators_in([{"noise": [generator]}]) == [generator]
        True
    """
    return objects_in(sources, GENERATORS)


def objects_in(sources: Iterable[Any], kinds: tuple[type[Any], ...]) -> list[Any]:
    """Every object of some classes that can be reached through attributes and containers alone.

    Args:
        sources: where the search begins; it ends after 100,000 objects.
        kinds: the classes.
    """
    objects, waiting = [], deque(sources)
    # With the objects themselves, so that no new one gets the identity of one that was seen.
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, kinds):
            objects.append(value)
        if not isinstance(value, GENERATORS):
            room = _MOST_SEARCHED - len(seen) - len(waiting)
            waiting.extend(islice(held_by(value), max(room, 0)))
    return objects


def state_restorer(generator: Any) -> Callable[[], None]:
    """A function that gives a random generator the state back that it has now."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return functools.partial(generator.set_state, generator.get_state())


def held_by(value: Any) -> list[Any]:
    """What an object holds directly, in attributes, as entries, or as the variables of a function."""
    if isinstance(value, (dict, list, tuple, set, deque)):
        return [] if len(value) > MOST_ENTRIES or is_plain(value) else entries_of(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return _variables_of(value)
    if isinstance(value, (type, ModuleType, Tensor, np.ndarray)) or not hasattr(value, "__dict__"):
        return []
    if not isinstance(value, nn.Module) and {package(kind) for kind in type(value).__mro__} & _TRAINING:
        return []
    return list(vars(value).values())


def entries_of(container: Any) -> list[Any]:
    """A container's entries, of a dictionary the values."""
    return list(container.values()) if isinstance(container, dict) else list(container)


def is_plain(container: Any) -> bool:
    """Whether all entries of a container are numbers or strings, which nobody can write into."""
    values = container.values() if isinstance(container, dict) else container
    return _PLAIN.issuperset(map(type, values))


def package(kind: type[Any]) -> str:
    """The top-level package in which a class is defined."""
    return kind.__module__.partition(".")[0]


def _variables_of(function: FunctionType) -> list[Any]:
    """The variables of a function that are defined outside of it."""
    try:
        outside = inspect.getclosurevars(function)
    except ValueError:  # a variable that is not defined yet
        return []
    return [*outside.nonlocals.values(), *outside.globals.values()]
