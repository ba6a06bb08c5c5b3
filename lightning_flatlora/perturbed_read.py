"""Let a LoRA layer read B + E while the parameter B stays as it is.

The module that holds B is given a subclass of its own class, in which the attribute that is B (``weight`` of a
``lora_B`` module, or a bare parameter ``lora_B`` of the layer) returns the perturbed value while a perturbation is set.
Parameters, names and state dicts are untouched, so the stored weights are the clean ones at every moment. (A
``forward`` override would be a silent no-op wherever peft reads ``lora_B.weight`` itself: attention that merges, DoRA
convolutions.)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora.class_overlay import READINGS, set_class


class Switch:
    """One flag for all readers of one owner, which need not walk over them twice in every step.

    Attributes:
        is_on: whether the readers that listen to it add their perturbation.
        is_connected: set by the owner after connecting the readers; false again as soon as one of them gets another
            owner.
    """

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on
        self.is_connected = False


# For readers without an owner that switches them.
_ALWAYS_ON = Switch(is_on=True)


@dataclass(frozen=True)
class ParameterRef:
    """Where a layer reads a factor: an attribute of a module, or some rows of it.

    Attributes:
        module: has the factor as its own parameter.
        name: the parameter's name in the module.
        rows: those of the factor, where several are stacked in one parameter; None for the whole parameter.

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
        """The parameter that the module has now, never perturbed; None where it is gone."""
        return self.module._parameters.get(self.name)


AnyRef = ParameterRef | nn.Module
"""A reader; a module stands for its weight."""


class _Reading:
    """What one attribute of a module adds to the parameter."""

    def __init__(self, only_views: bool) -> None:
        self.only_views = only_views
        self.switch = _ALWAYS_ON
        self.installs = 0
        self.parts: dict[range | None, Tensor] = {}

    def added_to(self, value: Tensor) -> Tensor:
        """B + E, out of place, so that autograd gives the gradient at B + E to the parameter B."""
        perturbed = value
        for rows, perturbation in self.parts.items():
            if rows is not None:
                around = (rows.start, len(value) - rows.stop)
                perturbation = F.pad(perturbation, (0, 0) * (value.ndim - 1) + around)
            perturbed = perturbed + perturbation
        return perturbed if perturbed.dtype == value.dtype else perturbed.to(value.dtype)


def as_ref(reader: AnyRef) -> ParameterRef:
    """A reader as such; a module stands for its weight."""
    return reader if isinstance(reader, ParameterRef) else ParameterRef(reader)


def install(reader: AnyRef, only_views: bool = False) -> None:
    """Make a module able to read a perturbed parameter; it reads the clean one until :func:`perturb`.

    Args:
        reader: what reads the parameter; a module stands for its weight.
        only_views: never perturb the parameter itself, only a tensor that has replaced it. FSDP1 replaces it in
            forward, and takes what it reads at other times to be the parameter's new value.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> install(layer); perturb(layer, torch.ones(2, 2))
        >>> bool((layer.weight == layer.state_dict()["weight"] + 1).all())
        True
        >>> uninstall(layer); type(layer).__name__
        'Linear'
    """
    reader = as_ref(reader)
    readings: dict[str, _Reading] = reader.module.__dict__.setdefault(READINGS, {})
    if reader.name not in readings:
        readings[reader.name] = _Reading(only_views)
        set_class(reader.module)
    readings[reader.name].installs += 1


def uninstall(reader: AnyRef) -> None:
    """Take one :func:`install` back; after the last one the module has its own class again."""
    reader = as_ref(reader)
    reading = _reading_of(reader)
    if reading is not None:
        reading.installs -= 1
        # Counted, because the monitor and the methods may install the same reader.
        if reading.installs == 0:
            perturb(reader, None)
            del reader.module.__dict__[READINGS][reader.name]
            set_class(reader.module)


def _reading_of(reader: ParameterRef) -> _Reading | None:
    readings: dict[str, _Reading] = reader.module.__dict__.get(READINGS, {})
    return readings.get(reader.name)


def perturb(reader: AnyRef, perturbation: Tensor | None, switch: Switch = _ALWAYS_ON) -> None:
    """Set what an installed reader adds to its parameter.

    Args:
        reader: what :func:`install` was given.
        perturbation: E, of the shape of the reader's rows, any floating dtype (the sum is taken in the wider of the
            two and rounded once); None for the clean value.
        switch: adds E only while this is on; without one, always.

    Raises:
        RuntimeError: the reader is not installed, so that E would be silently ignored.
    """
    reader = as_ref(reader)
    reading = _reading_of(reader)
    if reading is None:
        if perturbation is None:
            return
        name = type(reader.module).__name__
        raise RuntimeError(f"{name} can't read a perturbed {reader.name}: call install() first")
    if reading.switch is not switch:
        # Rows that another owner has perturbed are not this switch's.
        reading.switch.is_connected = False
        reading.switch, reading.parts = switch, {}
    if perturbation is None:
        reading.parts.pop(reader.rows, None)
    else:
        reading.parts[reader.rows] = perturbation


def shown(reader: AnyRef) -> Tensor | None:
    """What a reader adds to its parameter now; None for the clean value, and for one that is not installed."""
    reader = as_ref(reader)
    reading = _reading_of(reader)
    if reading is None or not reading.switch.is_on:
        return None
    return reading.parts.get(reader.rows)


@contextmanager
def restored(readers: Iterable[AnyRef]) -> Iterator[None]:
    """Afterwards, whatever happens, readers add to their parameters what they added before, switched as before."""
    before = []
    for reader in readers:
        reading = _reading_of(as_ref(reader))
        if reading is not None:
            before.append((reading, reading.switch, dict(reading.parts)))
    switches = {switch: switch.is_on for _, switch, _ in before}
    try:
        yield
    finally:
        for reading, switch, parts in before:
            if reading.switch is not switch:
                reading.switch.is_connected = False
            reading.switch, reading.parts = switch, parts
        for switch, was_on in switches.items():
            switch.is_on = was_on
