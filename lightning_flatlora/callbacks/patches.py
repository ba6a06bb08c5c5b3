"""Methods that replace those of a class on one object, for a limited time."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule


class _OnInstance:
    """A method that replaces its class's on one object; copies and pickles of the object have their class's own."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self.owner, self.name, self.method = owner, name, method
        self.beneath = owner.__dict__.get(name)
        self.is_over = False
        if hasattr(method, "__wrapped__"):
            self.__wrapped__ = method.__wrapped__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # On the copy this gives the class's method, since the copy has no attributes of its own at that moment.
        return getattr, (self.owner, self.name)


def put_on_instance(module: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method on one object, whether it comes from the class or was put on the object before.

    Returns:
        A function that restores the former method; calling it again does nothing. Where another method has been put
        over this one in the meantime, the former method is restored when that other one is removed.
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


def at_training_step(pl_module: LightningModule, action: Callable[[], None]) -> Callable[[], None]:
    """Call an action once, when the module's next training_step starts, which is after every hook before it.

    Returns:
        A function that cancels it, if it has not happened yet.
    """
    original = pl_module.training_step
    waiting = [action]

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        due = list(waiting)
        cancel()
        for each in due:
            each()
        return original(*args, **kwargs)

    # Lightning reads the arguments of what lies one layer below a decorator, and no deeper. So where the original is
    # decorated, too, what it decorates must lie there.
    training_step.__wrapped__ = getattr(original, "__wrapped__", original)
    put_back = put_on_instance(pl_module, "training_step", training_step)

    def cancel() -> None:
        # Emptied as well as put back: where another patch lies on top, this one remains callable.
        waiting.clear()
        put_back()

    return cancel


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: stands where there is nothing to put back, or to log."""


def without_logging(callback: Callback) -> dict[str, Any]:
    """A callback's attributes without the methods that Lightning gives it for a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
