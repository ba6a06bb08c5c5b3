"""Replace methods of one object for a limited time."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback


class _OnInstance:
    """A method that replaces its class's on one object."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self.method = method
        self.beneath = owner.__dict__.get(name)
        self.is_over = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def put_on_instance(module: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method on one object, whether it comes from the class or was put on the object before.

    Returns:
        A function that restores the former method; calling it again does nothing. If another method has been put over
        this one in the meantime, the former method is restored when that other one is removed.
    """
    attributes = module.__dict__
    patch = _OnInstance(module, name, method)
    attributes[name] = patch

    def put_back() -> None:
        patch.is_over = True
        # Patches may end in any order: those that are over go only when they lie on top.
        top = attributes.get(name)
        while isinstance(top, _OnInstance) and top.is_over:
            del attributes[name]
            if top.beneath is not None:
                attributes[name] = top.beneath
            top = attributes.get(name)

    return put_back


def put_on(owner: Any, methods: dict[str, Callable[..., Any]]) -> ExitStack:
    """Replace methods on one object, until the stack that is returned is closed."""
    patches = ExitStack()
    for name, method in methods.items():
        patches.callback(put_on_instance(owner, name, method))
    return patches


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: it stands where there is nothing to put back."""


def without_logging(callback: Callback) -> dict[str, Any]:
    """Give a callback's attributes without Lightning's methods of a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
