"""Give single modules a subclass of their class, which reads parameters or computes in another way.

The class itself is not changed, since its other modules must stay as they are.
"""

import copyreg
from functools import cache
from typing import Any, ClassVar

from torch import nn


class Overlay:
    """Mixin that comes before a module's own class.

    Its names are private, so that they don't hide a parameter or a submodule.

    Attributes:
        _overlay_state: name of the module's attribute that holds the mixin's state; copies of the module leave it out.
    """

    _overlay_state: ClassVar[str]
    _plain_class: type[nn.Module]

    @classmethod
    def _overlay_members(cls, names: tuple[str, ...]) -> dict[str, Any]:
        """Make the subclass's members for the keys of the state, if that is a dict."""
        return {}

    def _get_name(self) -> str:
        """Return the plain class's name, for printing."""
        return self._plain_class.__name__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the plain class, so that an average or a saved module never holds a perturbed reader."""
        left_out = {mixin._overlay_state for mixin in Overlay.__subclasses__()}
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class, without overlays."""
    return module._plain_class if isinstance(module, Overlay) else type(module)


def set_class(module: nn.Module) -> None:
    """Give a module the class of the mixins whose state it holds; without any, its own class."""
    mixins = []
    for mixin in Overlay.__subclasses__():
        state = module.__dict__.get(mixin._overlay_state)
        if state:
            mixins.append((mixin, tuple(sorted(state)) if isinstance(state, dict) else ()))
        else:  # an empty state is no longer needed
            module.__dict__.pop(mixin._overlay_state, None)
    kind: Any = plain_class(module)
    # Another library's class on top of ours, such as parametrize's or FSDP's, is not taken away.
    if type(module) is kind or "_plain_class" in vars(type(module)):
        module.__class__ = _class_of(kind, tuple(mixins)) if mixins else kind


# One class per kind of module, not per module: compiled graphs are guarded by the class.
@cache
def _class_of(plain: Any, mixins: tuple[tuple[type[Overlay], tuple[str, ...]], ...]) -> Any:
    members: dict[str, Any] = {"_plain_class": plain}
    for mixin, names in mixins:
        members |= mixin._overlay_members(names)
    kinds = [mixin for mixin, _ in mixins]
    return type("".join(kind.__name__.strip("_") for kind in kinds) + plain.__name__, (*kinds, plain), members)
