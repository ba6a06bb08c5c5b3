"""Methods that replace those of a class on one object, for a limited time."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_flatlora.callbacks.scheduler_states import schedule_restorer


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


def silenced(pl_module: LightningModule) -> ExitStack:
    """Inside, nothing that the module or a callback logs is taken up, and afterwards schedulers are as they were.

    The clean pass has logged and stepped already.
    """
    patches = put_on(pl_module, {"log": nothing})
    trainer = pl_module._trainer
    if trainer is None:
        return patches
    patches.callback(schedule_restorer(trainer))
    results = trainer._results
    if results is not None:
        # A loss object, and a callback, hold the method self.log of before, and an override may call super().log. That
        # method also forgets what was logged before by the same hook, if another one has logged since.
        patches.enter_context(put_on(results, {"log": nothing, "reset": nothing}))
        connector = trainer._logger_connector
        patches.callback(setattr, connector, "_current_fx", connector._current_fx)
    return patches


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: stands where there is nothing to put back, or to log."""


def without_logging(callback: Callback) -> dict[str, Any]:
    """A callback's attributes without the methods that Lightning gives it for a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
