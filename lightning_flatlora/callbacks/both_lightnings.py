"""Objects of Lightning under both of its names, ``lightning.pytorch`` and ``pytorch_lightning``.

Their code is identical, but each has its own classes.

The package imports only the first. A user's Trainer may come from either, so Lightning's objects are recognized by the
names of their classes, without importing a library that the user may not have.
"""

from typing import Any, TypeGuard, TypeVar

from lightning.pytorch import Callback, Trainer

# The other names of libraries that are also part of ``lightning``.
_PARTS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}

T = TypeVar("T")


def is_lightning(value: object, *kinds: type[T]) -> TypeGuard[T]:
    """Tell whether an object is an instance of a class of Lightning, under either of the library's names.

    Args:
        value: any object.
        kinds: classes of ``lightning.pytorch`` or ``lightning.fabric``; one of them suffices.

    Example:
        >>> from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
        >>> is_lightning(ModelCheckpoint(), Checkpoint), is_lightning("a string", Checkpoint)
        (True, False)
    """
    wanted = {_name(kind) for kind in kinds}
    return any(_name(each) in wanted for each in type(value).__mro__)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, an attribute that Lightning's types do not declare."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def callback_of(trainer: Trainer, kind: type[T]) -> T | None:
    """Return the first callback of a kind among those of a trainer."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def _name(kind: type[Any]) -> str:
    """Return a class's full name, equal under both names of Lightning."""
    library, _, rest = kind.__module__.partition(".")
    return f"{_PARTS.get(library, library)}.{rest}.{kind.__qualname__}"
