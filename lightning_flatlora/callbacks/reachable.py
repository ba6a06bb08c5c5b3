"""What an object leads to through its attributes and containers, such as random generators."""

import functools
import inspect
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
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
_LIBRARIES = {"torch", *_TRAINING, *sys.stdlib_module_names}
"""Packages that are no project's own."""


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


def variables_of_code(value: Any) -> list[Any]:
    """What an object's own code reads besides its attributes: those of its classes, and variables outside of them.

    Only classes and functions of the packages in which the object's classes are defined are looked at.

    Example:
        >>> class Step:
        ...     __module__ = "project"
        ...     noise = random.Random(0)
        >>> Step.noise in variables_of_code(Step())
        True
    """
    packages = own_packages([value])
    found: list[Any] = []
    waiting: deque[Any] = deque(kind for kind in type(value).__mro__ if package(kind) in packages)
    seen: set[int] = set()
    while waiting and len(seen) < MOST_ENTRIES:
        code = waiting.popleft()
        if id(code) in seen:
            continue
        seen.add(id(code))
        held = _variables_of(code) if isinstance(code, FunctionType) else list(vars(code).values())
        for each in map(_function_in, held):
            if not isinstance(each, (type, FunctionType)):
                found.append(each)
            elif package(each) in packages:
                waiting.append(each)
    return found


def own_packages(things: Iterable[Any]) -> set[str]:
    """The packages in which some objects' classes are defined, except for libraries."""
    packages: set[str] = set()
    for thing in things:
        owner = getattr(thing, "__self__", thing)  # of a bound method
        packages.update(package(kind) for kind in type(owner).__mro__)
    return packages - _LIBRARIES


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
    if isinstance(value, (type, ModuleType, Tensor, np.ndarray)):
        return []
    if not isinstance(value, nn.Module) and {package(kind) for kind in type(value).__mro__} & _TRAINING:
        return []
    return [*getattr(value, "__dict__", {}).values(), *_in_slots(value)]


def _in_slots(value: Any) -> list[Any]:
    """What an object holds whose class has ``__slots__``."""
    held = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if isinstance(vars(kind).get(name), MemberDescriptorType) and hasattr(value, name):
                held.append(getattr(value, name))
    return held


def entries_of(container: Any) -> list[Any]:
    """A container's entries, of a dictionary the values."""
    return list(_values(container))


def is_plain(container: Any) -> bool:
    """Whether all entries of a container are numbers or strings, which nobody can write into."""
    return _PLAIN.issuperset(map(type, _values(container)))


def _values(container: Any) -> Iterable[Any]:
    # Not its own method values(), which may load what it gives, as that of transformers' mappings of all models does.
    return dict.values(container) if isinstance(container, dict) else container


def package(kind: type[Any] | FunctionType) -> str:
    """The top-level package in which a class or a function is defined."""
    return (kind.__module__ or "").partition(".")[0]


def _function_in(value: Any) -> Any:
    """The function in what a class may make of it; any other value as it is."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _variables_of(function: FunctionType) -> list[Any]:
    """The variables of a function that are defined outside of it."""
    try:
        outside = inspect.getclosurevars(function)
    except ValueError:  # a variable that is not defined yet
        return []
    return [*outside.nonlocals.values(), *outside.globals.values()]
