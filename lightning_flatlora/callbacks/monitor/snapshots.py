"""Run a module's passes beside training, and leave the training exactly as it was."""

import copy
import dataclasses
import functools
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils.data import Dataset

from lightning_flatlora.callbacks.random_state import random_state
from lightning_flatlora.callbacks.reachable import (
    GENERATORS,
    MOST_ENTRIES,
    entries_of,
    generators_in,
    held_by,
    is_plain,
    own_packages,
    package,
    state_restorer,
    variables_of_code,
)
from lightning_flatlora.callbacks.silenced import silenced
from lightning_flatlora.callbacks.tensor_writes import (
    KeptValues,
    put_memory_back,
    untrained_parameters,
    writable_buffers,
)

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_MOST_OF_MODULES = 100_000
"""Of what an attribute of a module holds, only the outermost container is copied beyond so many entries in all."""


@contextmanager
def undisturbed(pl_module: LightningModule, written: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, a module is in eval mode, logs nothing, and works on copies of everything it keeps except parameters.

    So buffers (BatchNorm's), the states of torchmetrics, modes, and lists, counters or arrays that a step keeps on any
    of its modules, or on objects of the project's own classes there, are afterwards the same objects as before,
    whatever happens inside. A parameter that no optimizer trains is put back if a pass replaces it, and one that it
    writes in place if it is named. The random generators (Python, NumPy, PyTorch on the CPU and the module's device)
    are put back. Of a container with more than 100,000 entries in all, such as the samples of a data set, only the
    container itself is copied: what is written into its entries stays.

    Memory: a copy of the buffers, and of the parameters named.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.
        written: parameters that a training step writes in place and no optimizer trains, such as a momentum encoder's.
    """
    optimizers = [] if pl_module._trainer is None else pl_module.trainer.optimizers
    with ExitStack() as stack:
        stack.callback(random_state(pl_module.device))
        for generator in generators_in(variables_of_code(pl_module)):
            stack.callback(state_restorer(generator))
        copies = _Copies([pl_module])
        stack.callback(copies.put_back)
        for parameter in untrained_parameters(pl_module, optimizers):
            stack.callback(put_memory_back, parameter, parameter.data)
        stack.callback(KeptValues(written).put_back)
        stack.enter_context(_scripted_in_eval(pl_module))
        for module in pl_module.modules():
            if not isinstance(module, ScriptModule):
                copies.enter(module)
                # Not eval(), which a module may have overridden.
                module.__dict__["training"] = False
        stack.enter_context(silenced(pl_module))
        # A log that can't be replaced refuses what may not be logged in the hook that measures.
        pl_module.__dict__["_current_fx_name"] = "training_step"
        yield


@contextmanager
def _scripted_in_eval(pl_module: LightningModule) -> Iterator[None]:
    """Inside, scripted modules, whose state is in C++, are in eval mode; their modes and buffers are put back."""
    modes: list[tuple[ScriptModule, bool]] = []
    buffers: list[Tensor] = []
    for module in pl_module.modules():
        if isinstance(module, ScriptModule):
            buffers += writable_buffers(module).values()
            # One that was frozen by torch.jit has no mode.
            if hasattr(module, "training"):
                modes.append((module, module.training))
    values = KeptValues(buffers)
    for module, _ in modes:
        module.eval()
    try:
        yield
    finally:
        # Parents come first, and their children have modes of their own.
        for module, mode in modes:
            module.train(mode)
        values.put_back()


@contextmanager
def read_without_trace(*sources: Any) -> Iterator[None]:
    """Inside, data sets and what collates their samples may be read; afterwards they are as if nobody had read them.

    Random generators that can be reached from them, at any depth, are put back, and so are the attributes of data sets
    and of the project's own classes. Nothing large is copied, since it is taken to be data. The search for generators
    ends after 100,000 objects.

    Args:
        sources: data sets, functions, bound methods, or anything else.
    """
    with ExitStack() as stack:
        for generator in generators_in(sources):
            stack.callback(state_restorer(generator))
        copies = _Copies(sources, of_data=True)
        stack.callback(copies.put_back)
        for source in sources:
            copies.copied(source)
        yield


class _Copies:
    """Objects that work on copies of what their attributes hold, until they get their own attributes back.

    Args:
        things: objects of the packages in which their classes are defined are entered where an attribute holds one.
            Other objects stay as they are, since their state may belong to the whole program (a logger, a thread).
        of_data: whether data sets are read. Then the numbers in tensors and arrays count as entries, a container with
            too many is not copied at all, and after ten times as many nothing more is. Of a module's attributes the
            outermost container is copied whatever it holds.
    """

    def __init__(self, things: Iterable[Any], *, of_data: bool = False) -> None:
        self._packages, self._of_data = own_packages(things), of_data
        self._largest = MOST_ENTRIES if of_data else _MOST_OF_MODULES
        self._left: float = 10 * MOST_ENTRIES if of_data else math.inf
        # By the identity of the original: shared things stay shared, cycles end.
        self._copies: dict[int, Any] = {}
        # The objects whose attributes were replaced, and their own attributes.
        self._entered: dict[int, tuple[Any, dict[str, Any]]] = {}

    def enter(self, thing: Any) -> None:
        """Replace an object's attributes by copies."""
        if id(thing) in self._entered:
            return
        attributes = dict(vars(thing))
        self._entered[id(thing)] = thing, attributes
        for name, value in attributes.items():
            vars(thing)[name] = self.copied(value)

    def put_back(self) -> None:
        """Give all objects their own attributes back."""
        for thing, attributes in self._entered.values():
            # Cleared first, so that attributes which were added inside are gone, too.
            vars(thing).clear()
            vars(thing).update(attributes)

    def copied(self, value: Any) -> Any:
        """A copy of what may be written into, however deep it lies; anything else as it is."""
        if id(value) in self._copies or not self._is_large(value):
            return self._copied(value)
        if not self._of_data and type(value) in _CONTAINERS:
            self._copies[id(value)] = copy.copy(value)
        return self._copies.get(id(value), value)

    def _is_large(self, value: Any) -> bool:
        """Whether a container or tensor holds too much to be copied; what lies inside of objects is not counted."""
        entries, waiting, seen = 0, [value], set()
        while waiting:
            each = waiting.pop()
            if isinstance(each, (Tensor, np.ndarray)):
                # A module's are its state, and are copied whatever their size.
                entries += math.prod(each.shape) if self._of_data else 0
            elif (type(each) in _CONTAINERS or type(each) is tuple) and id(each) not in seen:
                seen.add(id(each))
                entries += len(each)
                if entries <= self._largest and not is_plain(each):
                    waiting += entries_of(each)
            if entries > min(self._largest, self._left):
                return True
        self._left -= entries
        return False

    def _copied(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        # Not parameters: few are written, those are put back by themselves, and copies of all would take the model's
        # memory once more.
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._copies[id(value)] = value.clone()
        elif isinstance(value, np.ndarray):
            self._copies[id(value)] = value.copy()
        elif isinstance(value, GENERATORS):
            self._copies[id(value)] = copy.deepcopy(value)
        elif type(value) in _CONTAINERS:
            self._copy_container(value)
        elif type(value) is tuple:
            # It can't be written into, but what it holds can.
            return tuple(self._copied(item) for item in value)
        elif isinstance(value, (MethodType, functools.partial)):
            # One by one: a list of them would be gone at once, and the next one might have its identity.
            for part in held_by(value):
                self.copied(part)
        elif self._is_entered(value):
            self.enter(value)
        return self._copies.get(id(value), value)

    def _copy_container(self, value: Any) -> None:
        twin = copy.copy(value)
        # Before its entries, which may hold the container itself.
        self._copies[id(value)] = twin
        if is_plain(value):
            return
        if isinstance(twin, dict):
            for key, item in value.items():
                dict.__setitem__(twin, key, self._copied(item))
        elif isinstance(twin, (list, deque)):
            for place, item in enumerate(value):
                twin[place] = self._copied(item)

    def _is_entered(self, value: Any) -> bool:
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return False
        # A library's may hold the project's own, as a Subset does.
        if isinstance(value, Dataset):
            self._packages |= own_packages([value])
            return True
        if isinstance(value, (nn.Module, SimpleNamespace)) or dataclasses.is_dataclass(value):
            return True
        packages = {package(kind) for kind in type(value).__mro__}
        # All bases have to be the project's: a library's base may hold what belongs to the whole program.
        return bool(packages & self._packages) and packages <= self._packages | set(sys.stdlib_module_names)
