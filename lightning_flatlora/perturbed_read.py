"""Let a LoRA layer read B + E without changing the parameter B.

The module that holds B gets a subclass of its class, in which B's attribute (``weight`` of a ``lora_B`` module, or a
bare parameter ``lora_B`` of the layer) returns the perturbed value while a perturbation is set. Parameters, names and
state dicts are untouched, so the stored weights are always clean. (Overriding ``forward`` would have no effect if peft
reads ``lora_B.weight`` itself, as in attention that merges and in DoRA convolutions.)
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_flatlora.class_overlay import Overlay, set_class

READINGS = "_flatlora_readings"
"""The attribute in which a module keeps its perturbed readings."""


class Switch:
    """One flag for all readers of an owner, which would otherwise have to loop over them twice per step.

    Attributes:
        is_on: whether the owner's readers add its perturbation.
        only_with_grad: whether they do so only while autograd records, as in a training pass. What runs under
            ``no_grad``, such as a teacher's targets or generation, then reads clean values.
    """

    def __init__(self, is_on: bool = False, only_with_grad: bool = False) -> None:
        self.is_on, self.only_with_grad = is_on, only_with_grad


@dataclass(frozen=True)
class ParameterRef:
    """Where a layer reads a factor: an attribute of a module, or some rows of it.

    Attributes:
        module: has the factor as its own parameter.
        name: the parameter's name in the module.
        rows: the factor's rows, if several factors are stacked in one parameter; None for the whole parameter.

    Example:
        A fused layer whose rows 0 to 3 are the queries' B:

        >>> fused = nn.Linear(2, 12, bias=False)
        >>> reader = ParameterRef(fused, rows=range(4))
        >>> reader.name, len(reader.rows)
        ('weight', 4)
    """

    module: nn.Module
    name: str = "weight"
    rows: range | None = None

    @property
    def parameter(self) -> Any:
        """The module's current parameter, never perturbed; None if it is gone."""
        return self.module._parameters.get(self.name)


AnyRef = ParameterRef | nn.Module
"""A reader; a module means its weight."""


Parts = dict[range | None, Tensor]
"""E, by the rows of the parameter to which it is added."""


_CLEAN: tuple["Switch", Parts] = Switch(), {}

_WAS_CLEAN = (
    "a backward pass computes a layer again, at perturbed weights, that the forward pass had read clean. If it was in "
    "eval mode, call model.train() before. If it ran under no_grad on purpose, as in GradCache and Cached... losses, "
    "run the step in a loop inside `for each_pass in flat.training_passes(also_no_grad=True):` and `with each_pass:`"
)


def autograd_records() -> bool:
    """Say whether the gradient passes through what runs now: not under ``no_grad``, except in an autograd function.

    In a :class:`torch.autograd.Function`, such as a reentrant activation checkpoint, gradients are switched off, too,
    but its backward computes them. No flag of PyTorch's tells the two apart.
    """
    return torch.is_grad_enabled() or _in_autograd_function()


# Not traced: a compiled layer may be called in a checkpoint that is not compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_autograd_function() -> bool:
    frame: Any = sys._getframe()
    inner = frame
    while frame is not None:
        # In its backward, a checkpoint computes its forward again, with the parts that are under no_grad.
        if frame.f_code is _BACKWARD or (frame.f_code is _FORWARD and _has_way_back(frame, inner)):
            return True
        frame, inner = frame.f_back, frame
    return False


def _has_way_back(apply: Any, inner: Any) -> bool:
    """Say whether autograd recorded when a function was called, by its frames of ``apply`` and of ``forward``."""
    given = inner.f_locals.get(inner.f_code.co_varnames[0])
    context = given[0] if isinstance(given, tuple) and given else given
    if isinstance(context, torch.autograd.function.FunctionCtx):
        return bool(context.next_functions)  # type: ignore[attr-defined]
    # A forward with a separate setup_context gets no context.
    return any(isinstance(each, Tensor) and each.requires_grad for each in apply.f_locals["args"])


_FORWARD = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__


def in_backward() -> bool:
    """Say whether a backward pass is running, which compiled code can't ask."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Reading:
    """The perturbations that one attribute of a module adds to the parameter.

    Attributes:
        only_views: see :func:`perturb`.
        sources: the E of each owner; the last one that is switched on is read.
        was_perturbed, was_clean: whether a pass that autograd records has read the perturbed value, and the clean one,
            since they were last set.
    """

    def __init__(self, only_views: bool) -> None:
        self.only_views = only_views
        self.sources: list[tuple[Switch, Parts]] = []
        self.was_perturbed = self.was_clean = False

    def source(self) -> tuple[Switch, Parts]:
        """Return the owner whose parts are currently added, and these; none for the clean value."""
        for source in reversed(self.sources):
            if source[0].is_on:
                return source
        return _CLEAN

    def stays_clean(self, switch: Switch) -> bool:
        """Say whether an owner's parts are only for passes that autograd records, of which this is none.

        Raises:
            RuntimeError: this is a backward pass, but the layer's forward pass has read the clean value.
        """
        if switch.only_with_grad:
            if not autograd_records():
                return True
            if in_backward() and not self.was_perturbed:
                raise RuntimeError(_WAS_CLEAN)
            self.was_perturbed = True
        return False

    def take(self, switch: Switch) -> Parts:
        """Remove an owner's parts, and return them."""
        for source in self.sources:
            if source[0] is switch:
                self.sources.remove(source)
                return source[1]
        return {}

    def added_to(self, value: Tensor, parts: Parts) -> Tensor:
        """Return B + E out of place, so that autograd gives the parameter B the gradient at B + E."""
        perturbed = value
        for rows, perturbation in parts.items():
            if rows is not None:
                around = (rows.start, len(value) - rows.stop)
                perturbation = F.pad(perturbation, (0, 0) * (value.ndim - 1) + around)
            perturbed = perturbed + perturbation
        return perturbed if perturbed.dtype == value.dtype else perturbed.to(value.dtype)


class _Perturbed(Overlay):
    """Mixin of modules in which some parameters are properties."""

    _overlay_state = READINGS

    @classmethod
    @override
    def _overlay_members(cls, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: _property_of(name) for name in names}


def _property_of(attribute: str) -> property:
    """Make a property for a parameter: it returns B, or B + E while E is set and switched on."""

    def read(self: Any) -> Tensor | None:
        # In forward FSDP1 replaces the parameter by a view of the gathered values.
        value: Tensor | None = self.__dict__.get(attribute)
        if value is None:
            if attribute not in self._parameters:
                raise AttributeError(attribute)
            value = self._parameters[attribute]
        # Gone if another library has put its class on top of this one, which therefore stays.
        reading = self.__dict__.get(READINGS, {}).get(attribute)
        if value is None or reading is None:
            return value
        switch, parts = reading.source()
        if not parts:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                reading.was_clean = True
            return value
        is_parameter = isinstance(value, nn.Parameter)
        of_fsdp2 = isinstance(value, DTensor) and not any(isinstance(part, DTensor) for part in parts.values())
        if of_fsdp2 or (reading.only_views and is_parameter) or not value.numel():
            # Outside of forward FSDP2 and FSDP1 look at the parameter itself, which must stay clean, and ZeRO-3 has put
            # its values away.
            return value
        if not value.requires_grad and not reading.only_views:
            # Frozen, maybe for only one pass, as by toggle_optimizer, or a teacher's values that functional_call has
            # put here. Only trained values are perturbed.
            return value
        if reading.stays_clean(switch):
            return value
        perturbed: Tensor = reading.added_to(value, parts)
        # For hooks that read this tensor's gradient or change it in place; the sum itself keeps no gradient.
        if is_parameter and not torch.compiler.is_compiling():
            gradient = value.grad
            if gradient is not None and gradient.dtype == perturbed.dtype:
                perturbed.grad = gradient
        return perturbed

    # For FSDP1, which sets and deletes its views under the parameter's name.
    def write(self: Any, value: Tensor | None) -> None:
        self.__dict__[attribute] = value

    def delete(self: Any) -> None:
        del self.__dict__[attribute]

    return property(read, write, delete)


def as_ref(reader: AnyRef) -> ParameterRef:
    """Return a reader as a reference; a module means its weight."""
    return reader if isinstance(reader, ParameterRef) else ParameterRef(reader)


def perturb(reader: AnyRef, perturbation: Tensor, switch: Switch, only_views: bool = False) -> None:
    """Let a reader add E to its parameter while a switch is on, until :func:`release`.

    Args:
        reader: reads the parameter; a module means its weight.
        perturbation: E, of the shape of the reader's rows, any floating dtype (the sum is computed in the wider of the
            two dtypes and rounded once).
        switch: the owner's. If several owners are on, the last one to call this is read.
        only_views: never perturb the parameter itself, only a tensor that has replaced it. FSDP1 replaces it in
            forward, and at other times would take a perturbed value for the parameter's new value.

    Example:
        >>> import torch
        >>> layer, switch = nn.Linear(2, 2, bias=False), Switch()
        >>> perturb(layer, torch.ones(2, 2), switch)
        >>> switch.is_on = True
        >>> bool((layer.weight == layer.state_dict()["weight"] + 1).all())
        True
        >>> release(layer, switch); type(layer).__name__
        'Linear'
    """
    reader = as_ref(reader)
    readings: dict[str, _Reading] = reader.module.__dict__.setdefault(READINGS, {})
    if reader.name not in readings:
        readings[reader.name] = _Reading(only_views)
        set_class(reader.module)
    reading = readings[reader.name]
    parts = reading.take(switch)
    parts[reader.rows] = perturbation
    reading.sources.append((switch, parts))


def release(reader: AnyRef, switch: Switch) -> None:
    """Let a reader stop adding an owner's E; without any owner the module gets its own class back."""
    reading = reading_of(reader)
    if reading is not None:
        reading.take(switch)
        if not reading.sources:
            reader = as_ref(reader)
            del reader.module.__dict__[READINGS][reader.name]
            set_class(reader.module)


def reading_of(reader: AnyRef) -> _Reading | None:
    """Return what a reader adds to its parameter, and how it was read; None if nobody perturbs it."""
    reader = as_ref(reader)
    readings: dict[str, _Reading] = reader.module.__dict__.get(READINGS, {})
    return readings.get(reader.name)


def shown(reader: AnyRef) -> Tensor | None:
    """Return the E that a reader currently adds to its parameter; None for the clean value."""
    reading = reading_of(reader)
    return None if reading is None else reading.source()[1].get(as_ref(reader).rows)


@contextmanager
def perturbed(E: Mapping[AnyRef, Tensor], only_views: bool = False, only_with_grad: bool = False) -> Iterator[None]:
    """Let each reader add its E inside; afterwards, even after an error, restore the former state.

    Args:
        E: of each reader.
        only_views: see :func:`perturb`.
        only_with_grad: see :class:`Switch`.
    """
    switch = Switch(is_on=True, only_with_grad=only_with_grad)
    try:
        for reader, perturbation in E.items():
            perturb(reader, perturbation, switch, only_views)
        yield
    finally:
        for reader in E:
            release(reader, switch)


@contextmanager
def clean(readers: Iterable[AnyRef]) -> Iterator[None]:
    """Let readers read clean parameters inside; afterwards, even after an error, restore the former state."""
    switches: set[Switch] = set()
    for reader in readers:
        reading = reading_of(reader)
        if reading is not None:
            switches.update(switch for switch, _ in reading.sources if switch.is_on)
    for switch in switches:
        switch.is_on = False
    try:
        yield
    finally:
        for switch in switches:
            switch.is_on = True


GATES_CLOSED = Switch()
"""On inside :func:`gates_closed`."""


@contextmanager
def gates_closed() -> Iterator[None]:
    """Keep layers inside from switching on a perturbation when called, as for a measurement at the clean weights."""
    before, GATES_CLOSED.is_on = GATES_CLOSED.is_on, True
    try:
        yield
    finally:
        GATES_CLOSED.is_on = before
