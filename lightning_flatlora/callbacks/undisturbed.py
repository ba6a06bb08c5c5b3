"""Run a module's passes beside training, and leave training as it was to the bit."""

import copy
import dataclasses
import functools
import inspect
import math
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_flatlora.callbacks.two_passes import random_state, silenced_log

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_flatlora", *sys.stdlib_module_names}
_PLAIN = {int, float, complex, bool, str, bytes, type(None)}
_LARGE = 10_000
"""Entries and numbers, in all, from which what an attribute of a data set holds is taken for data, not written to."""
_MUCH = 100_000
"""Entries, in all, from which of what an attribute of a module holds the outermost container alone is copied."""
_MOST = 100_000
"""Things that are looked at, the nearest first, in search of random generators."""
_TRAINING = {"lightning", "pytorch_lightning", "lightning_flatlora"}
"""A trainer, from which all of the training could be reached, and what belongs to one."""


@contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Inside, a module is in eval mode, logs nothing, and works on copies of all that its parts keep but parameters.

    So buffers (BatchNorm's), torchmetrics' states, modes, and lists, counters or arrays that a step keeps on any of its
    modules, or on objects of the project's own classes there, are afterwards the very objects that they were, whatever
    happens inside; the random generators (Python, NumPy, PyTorch on the CPU and the module's device) are put back. Of a
    container that holds more than 100,000 entries in all, as a data set's samples, only the container itself is copied:
    what is written into its entries stays.
    Memory: a copy of the buffers.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.
    """
    put_back_random_state = random_state(pl_module.device)
    copies = _Copies(_packages([pl_module]), _MUCH)
    try:
        for module in pl_module.modules():
            copies.enter(module)
            module.__dict__["training"] = False  # not eval(), which a module may have overridden
        with silenced_log(pl_module):
            yield
    finally:
        copies.put_back()
        put_back_random_state()


@contextmanager
def read_without_trace(*sources: Any) -> Iterator[None]:
    """Inside, data sets and what collates their samples may be read; afterwards they are as if nobody had.

    Random generators that can be reached from them, at any depth, go back to where they were, and so do the attributes
    of data sets and of the project's own classes. Nothing large is copied: it is taken for data. The search for
    generators ends after 100,000 things.

    Args:
        sources: data sets, functions, bound methods; anything else will do.
    """
    put_back = [_state_of(generator) for generator in _generators_in(sources)]
    copies = _Copies(_packages(sources), _LARGE, of_data=True)
    try:
        for source in sources:
            copies.copied(source)
        yield
    finally:
        copies.put_back()
        for generator, state in put_back:
            _set_state(generator, state)


class _Copies:
    """Objects that work on copies of what their attributes hold, until they get their own attributes back.

    Args:
        packages: whose classes' objects are entered where an attribute holds one; those of others stay as they are, as
            their state may be a whole programme's (a logger, a thread).
        largest: entries, in all, of a container that is copied with all that it holds; of a larger one only the
            outermost container is.
        of_data: whether it is data sets that are read: numbers of tensors and arrays then count as entries, what is
            larger is left as it is, and so is the rest after ten times as many entries.
    """

    def __init__(self, packages: set[str], largest: int, *, of_data: bool = False) -> None:
        self._packages, self._largest, self._of_data = packages, largest, of_data
        self._left: float = 10 * largest if of_data else math.inf
        self._copies: dict[int, Any] = {}  # by the identity of the original: shared things stay shared, cycles end
        self._kept: list[tuple[Any, dict[str, Any]]] = []
        self._entered: set[int] = set()

    def enter(self, thing: Any) -> None:
        """Replace an object's attributes by copies."""
        if id(thing) in self._entered:
            return
        self._entered.add(id(thing))
        attributes = dict(vars(thing))
        self._kept.append((thing, attributes))
        for name, value in attributes.items():
            vars(thing)[name] = self.copied(value)

    def put_back(self) -> None:
        """Give all objects their own attributes back."""
        for thing, attributes in self._kept:
            vars(thing).clear()
            vars(thing).update(attributes)

    def copied(self, value: Any) -> Any:
        """What may be written into, as an object of its own, however deep it lies; anything else as it is."""
        if id(value) in self._copies or not self._is_large(value):
            return self._copied(value)
        if not self._of_data and type(value) in _CONTAINERS:
            self._copies[id(value)] = copy.copy(value)
        return self._copies.get(id(value), value)

    def _is_large(self, value: Any) -> bool:
        """Whether what a container or tensor holds is too much to be copied; nothing inside of objects is counted."""
        entries, waiting, seen = 0, [value], set()
        while waiting:
            each = waiting.pop()
            if isinstance(each, Tensor):
                entries += each.numel() if self._of_data else 0
            elif isinstance(each, np.ndarray):
                entries += each.size if self._of_data else 0
            elif (type(each) in _CONTAINERS or type(each) is tuple) and id(each) not in seen:
                seen.add(id(each))
                entries += len(each)
                if entries <= self._largest and not _is_plain(each):
                    waiting += _entries(each)
            if entries > min(self._largest, self._left):
                return True
        self._left -= entries
        return False

    def _copied(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._copies[id(value)] = value.clone()
        elif isinstance(value, np.ndarray):
            self._copies[id(value)] = value.copy()
        elif isinstance(value, _GENERATORS):
            self._copies[id(value)] = copy.deepcopy(value)
        elif type(value) in _CONTAINERS:
            self._copy_container(value)
        elif type(value) is tuple:
            return tuple(self._copied(item) for item in value)
        elif isinstance(value, MethodType):
            self.copied(value.__self__)
        elif isinstance(value, functools.partial):
            self.copied([value.func, *value.args, *value.keywords.values()])
        elif self._is_entered(value):
            self.enter(value)
        return self._copies.get(id(value), value)

    def _copy_container(self, value: Any) -> None:
        own = self._copies[id(value)] = copy.copy(value)
        if _is_plain(value):
            return
        if isinstance(own, dict):
            for key, item in value.items():
                dict.__setitem__(own, key, self._copied(item))
        elif isinstance(own, (list, deque)):
            for place, item in enumerate(value):
                own[place] = self._copied(item)

    def _is_entered(self, value: Any) -> bool:
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return False
        if isinstance(value, Dataset):  # a library's may hold the project's own, as a Subset does
            self._packages |= _packages([value])
            return True
        if isinstance(value, (nn.Module, SimpleNamespace)) or dataclasses.is_dataclass(value):
            return True
        packages = {_package(kind) for kind in type(value).__mro__}
        return bool(packages & self._packages) and packages <= self._packages | set(sys.stdlib_module_names)


def _packages(things: Iterable[Any]) -> set[str]:
    """The packages that the classes of some objects are from, libraries apart."""
    owners = [getattr(thing, "__self__", thing) for thing in things]
    return {_package(kind) for owner in owners for kind in type(owner).__mro__} - _LIBRARIES


def _package(kind: type[Any]) -> str:
    return kind.__module__.partition(".")[0]


def _generators_in(sources: Iterable[Any]) -> list[Any]:
    """Every random generator that can be reached, without asking any object for more than its attributes."""
    found, seen, waiting = [], set(), deque(sources)
    kept = []  # whose identities must not be given to others meanwhile
    while waiting:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, _GENERATORS):
            found.append(value)
        else:
            room = _MOST - len(seen) - len(waiting)
            waiting.extend(islice(_parts(value), max(room, 0)))
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (dict, list, tuple, set, deque)):
        return [] if len(value) > _LARGE or _is_plain(value) else _entries(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return _variables_of(value)
    if isinstance(value, (type, ModuleType, Tensor, np.ndarray)) or not hasattr(value, "__dict__"):
        return []
    if not isinstance(value, nn.Module) and {_package(kind) for kind in type(value).__mro__} & _TRAINING:
        return []
    return list(vars(value).values())


def _entries(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _is_plain(container: Any) -> bool:
    """Whether all entries of a container are numbers or strings, which nobody can write into."""
    entries = container.values() if isinstance(container, dict) else container
    return _PLAIN.issuperset(map(type, entries))


def _variables_of(function: FunctionType) -> list[Any]:
    """What a function finds outside of itself."""
    try:
        outside = inspect.getclosurevars(function)
    except ValueError:  # a variable that is not there yet
        return []
    return [*outside.nonlocals.values(), *outside.globals.values()]


def _state_of(generator: Any) -> tuple[Any, Any]:
    if isinstance(generator, random.Random):
        return generator, generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator, generator.bit_generator.state
    return generator, generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
