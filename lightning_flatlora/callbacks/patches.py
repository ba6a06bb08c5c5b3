"""Replace methods and other attributes of one object for a limited time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule


def put_on_instance(owner: Any, name: str, method: Any) -> Callable[[], None]:
    """Replace a method, or another attribute, on one object, whether it comes from the class or not.

    Returns:
        A function that restores the former method; calling it again does nothing. If another method has been put over
        this one in the meantime, that one stays.
    """
    attributes = owner.__dict__
    # Patches may end in any order, so all of them are kept, under them what the object itself had, or None.
    place = f"_replaced_{name}"
    layers = attributes.setdefault(place, [attributes.get(name)])
    layers.append(method)
    attributes[name] = method

    def put_back() -> None:
        if method not in layers:
            return
        # What somebody else has put on top without this function stays.
        is_on_top = attributes.get(name) is method
        layers.remove(method)
        if is_on_top and layers[-1] is None:
            del attributes[name]
        elif is_on_top:
            attributes[name] = layers[-1]
        if len(layers) == 1:
            attributes.pop(place, None)

    return put_back


def put_on(owner: Any, methods: dict[str, Any]) -> ExitStack:
    """Replace methods on one object, until the stack that is returned is closed."""
    patches = ExitStack()
    for name, method in methods.items():
        patches.callback(put_on_instance(owner, name, method))
    return patches


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: it stands in for a method, or where there is nothing to put back."""


def without_logging(callback: Callback) -> dict[str, Any]:
    """Give a callback's attributes without Lightning's methods of a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Inside, nothing that the module or a callback logs is taken up: the first pass has logged already."""
    trainer = pl_module.trainer
    with put_on(pl_module, {"log": nothing}) as stack:
        # A loss object, and a callback, hold the method self.log of before, and an override may call super().log.
        # That method also forgets what was logged before by the same hook, if another one has logged since.
        stack.enter_context(put_on(trainer._results, {"log": nothing, "reset": nothing}))
        connector = trainer._logger_connector
        stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield
