"""Give single modules subclasses of their own classes, in which B is read perturbed or a call does something more.

A subclass and not members of the class, since other modules of the class must stay as they are.
"""

import copyreg
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

READINGS, GATES = "_flatlora_readings", "_flatlora_gates"
"""The attributes of a module that hold what it reads perturbed, and its gates."""


class Overlay:
    """Mixin before a module's own class.

    Its names are private, lest they hide a parameter or a submodule of the same name.

    Attributes:
        _overlay_state: the attribute of a module that holds what the mixin needs; copies of the module leave it out.
    """

    _overlay_state: ClassVar[str]
    _plain_class: type[nn.Module]

    def _get_name(self) -> str:
        """Print as the plain class."""
        return self._plain_class.__name__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles are of the plain class: an average or a saved module never holds a perturbed reader."""
        left_out = {mixin._overlay_state for mixin in Overlay.__subclasses__()}
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


class _Perturbed(Overlay):
    """Mixin of modules some of whose parameters are properties."""

    _overlay_state = READINGS


class _Gated(Overlay):
    """Mixin that asks gates around each call of a layer.

    An override of ``forward`` would not be called if a library has put another forward on the layer itself, and hooks
    would go into copies of the model.
    """

    _overlay_state = GATES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if GATES not in self.__dict__:
            # The gates have gone, and somebody has kept this method, as torch.compile(layer) does.
            return type(self).__call__(self, *args, **kwargs)
        opened = [gate for gate in self.__dict__[GATES] if gate.opens_for(self)]
        for gate in opened:
            gate.perturbation.on()
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            for gate in opened:
                gate.perturbation.off()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Give a module's own class, whatever lies over it."""
    return module._plain_class if isinstance(module, Overlay) else type(module)


def set_class(module: nn.Module) -> None:
    """Give a module the class of the mixins whose state it holds now; without any, its own class."""
    mixins = []
    for mixin in Overlay.__subclasses__():
        if module.__dict__.get(mixin._overlay_state):
            mixins.append(mixin)
        else:  # an empty state is not needed any more
            module.__dict__.pop(mixin._overlay_state, None)
    kind: Any = plain_class(module)
    if mixins:
        read = sorted(module.__dict__.get(READINGS, ()))
        kind = _class_of(kind, tuple(mixins), tuple(read))
    module.__class__ = kind


# One class for each kind of module, not one for each module: compiled graphs are guarded by the class.
@cache
def _class_of(plain: Any, mixins: tuple[type[Overlay], ...], attributes: tuple[str, ...]) -> Any:
    name = "".join(mixin.__name__.strip("_") for mixin in mixins) + plain.__name__
    members: dict[str, Any] = {attribute: _property_of(attribute) for attribute in attributes}
    return type(name, (*mixins, plain), {"_plain_class": plain, **members})


def _property_of(attribute: str) -> property:
    """A parameter as a property: B, or B + E while E is set and switched on."""

    def read(self: Any) -> Tensor | None:
        # FSDP1 takes the parameter away in forward and sets a view of the gathered values in its place.
        value: Tensor | None = self.__dict__.get(attribute)
        if value is None:
            if attribute not in self._parameters:
                raise AttributeError(attribute)
            value = self._parameters[attribute]
        reading = self.__dict__[READINGS][attribute]
        parts = reading.parts()
        if value is None or not parts:
            return value
        is_parameter = isinstance(value, nn.Parameter)
        if isinstance(value, DTensor) or (reading.only_views and is_parameter):
            # Outside of forward FSDP2 and FSDP1 look at the parameter itself, which must stay clean.
            return value
        if not value.requires_grad and not reading.only_views:
            # Frozen, maybe for one pass alone, as by toggle_optimizer, or the values of a teacher that functional_call
            # has put here. Only what is being trained is perturbed.
            return value
        perturbed: Tensor = reading.added_to(value, parts)
        # For hooks that look at the gradient of what they read here, or change it in place; the sum itself has none.
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
