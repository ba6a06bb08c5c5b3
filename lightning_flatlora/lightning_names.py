"""Lightning has two names, ``lightning.pytorch`` and ``pytorch_lightning``: the same code, but classes of their own.

The package imports the first alone. What a user's Trainer brings may be of either, so objects of Lightning are told
apart here by the names of their classes, without importing a library that the user has not.
"""

import sys
from functools import cache
from typing import Any, TypeGuard, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import exceptions

_NAMES = {
    "lightning.pytorch": "pytorch",
    "pytorch_lightning": "pytorch",
    "lightning.fabric": "fabric",
    "lightning_fabric": "fabric",
}

T = TypeVar("T")


def is_lightning(value: object, *kinds: type[T]) -> TypeGuard[T]:
    """Whether an object is an instance of a class of Lightning, under either of the library's names.

    Args:
        value: anything.
        kinds: classes of ``lightning.pytorch`` or ``lightning.fabric``; one of them suffices.

    Example:
        >>> from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
        >>> is_lightning(ModelCheckpoint(), Checkpoint), is_lightning("a string", Checkpoint)
        (True, False)
    """
    if isinstance(value, kinds):
        return True
    wanted = {_name(kind) for kind in kinds}
    return any(_name(each) in wanted for each in type(value).__mro__)


def is_defined_by_lightning(value: object) -> bool:
    """Whether an object's own class, and not only one that it inherits from, is of Lightning."""
    return _name(type(value))[0] in _NAMES.values()


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer, which Lightning's types do not tell."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _name(kind: type[Any]) -> tuple[str, str]:
    """A class's library and its name within it, the same under both names of Lightning."""
    for prefix, library in _NAMES.items():
        if kind.__module__ == prefix or kind.__module__.startswith(f"{prefix}."):
            return library, f"{kind.__module__.removeprefix(prefix)}.{kind.__qualname__}"
    return "", f"{kind.__module__}.{kind.__qualname__}"


class MisconfigurationException(exceptions.MisconfigurationException):
    """Lightning's exception of this name, which an ``except`` of either library catches.

    Example:
        >>> from lightning.pytorch.utilities.exceptions import MisconfigurationException as LightningsOwn
        >>> try:
        ...     raise MisconfigurationException("rho must be >= 0")
        ... except LightningsOwn as error:
        ...     print(error)
        rho must be >= 0
    """

    def __new__(cls, *args: object) -> "MisconfigurationException":  # noqa: D102
        # Code that has not imported the other library can't catch its exception, so it is not imported here.
        other = sys.modules.get("lightning_fabric.utilities.exceptions")
        kind = _under_both_names(other.MisconfigurationException) if other else cls
        return super().__new__(kind, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return MisconfigurationException, self.args


@cache
def _under_both_names(other: type[Exception]) -> type[MisconfigurationException]:
    return type("MisconfigurationException", (MisconfigurationException, other), {"__module__": __name__})
