"""Give single modules subclasses of their own classes, and their own classes back.

Overlays may come and go in any order: the class is made of all that lie on a module at the time.
"""

import copyreg
from functools import cache
from typing import Any, ClassVar

from torch import nn


class Overlay:
    """Mixin before a module's own class.

    Its names are private, lest they hide a parameter or a submodule of the same name.

    Attributes:
        _overlay_prefix: of the name of a class with this mixin.
        _overlay_state: the attribute of a module that holds what the mixin needs; copies of the module leave it out.
    """

    _overlay_prefix: ClassVar[str]
    _overlay_state: ClassVar[str]
    _overlays: "dict[type[Overlay], tuple[str, ...]]"
    _plain_class: Any

    @staticmethod
    def _overlay_members(attributes: tuple[str, ...]) -> dict[str, Any]:
        """Give what the class of a module has beyond the mixin, for the attributes that the mixin was put on with."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles are of the plain class: an average or a saved module never holds a perturbed reader."""
        left_out = {"_overlays", *(overlay._overlay_state for overlay in self._overlays)}
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Give a module's own class, whatever lies over it."""
    kind: type[nn.Module] = module._plain_class if isinstance(module, Overlay) else type(module)
    return kind


def put_on(module: nn.Module, overlay: type[Overlay], attributes: tuple[str, ...] = ()) -> None:
    """Lay a mixin over a module's class, or change the attributes of one that lies there."""
    module.__dict__.setdefault("_overlays", {})[overlay] = attributes
    _set_class(module)


def take_off(module: nn.Module, overlay: type[Overlay]) -> None:
    """Take a mixin and its state away; after the last one the module has its own class again."""
    module.__dict__["_overlays"].pop(overlay)
    module.__dict__.pop(overlay._overlay_state)
    _set_class(module)


def _set_class(module: nn.Module) -> None:
    plain: Any = plain_class(module)
    overlays: dict[type[Overlay], tuple[str, ...]] = module.__dict__["_overlays"]
    if overlays:
        # A subclass and not members of the class, since other modules of the class must stay as they are.
        ordered = sorted(overlays.items(), key=lambda item: item[0]._overlay_prefix)
        module.__class__ = _class_of(plain, tuple(ordered))
    else:
        module.__class__ = plain
        del module.__dict__["_overlays"]


# One class for each kind of module, not one for each module: compiled graphs are guarded by the class.
@cache
def _class_of(plain: Any, overlays: tuple[tuple[type[Overlay], tuple[str, ...]], ...]) -> Any:
    name = plain.__name__
    members: dict[str, Any] = {"_plain_class": plain}
    for overlay, attributes in reversed(overlays):
        name = overlay._overlay_prefix + name
        members |= overlay._overlay_members(attributes)
    return type(name, (*(overlay for overlay, _ in overlays), plain), members)
