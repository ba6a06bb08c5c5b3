"""Replace methods and other attributes of one object for a limited time."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def put_on_instance(owner: Any, name: str, method: Any) -> Callable[[], None]:
    """Replace a method, or another attribute, on one object, wherever it comes from.

    Returns:
        A function that restores the former method; calling it again does nothing. If another method has replaced this
        one in the meantime, that one stays.
    """
    attributes = owner.__dict__
    # Patches may end in any order, so all of them are kept, above the object's original attribute or None.
    place = f"_replaced_{name}"
    layers = attributes.setdefault(place, [attributes.get(name)])
    layers.append(method)
    attributes[name] = method

    def put_back() -> None:
        if method not in layers:
            return
        # A replacement made without this function stays.
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
    """Replace methods on one object until the returned stack is closed."""
    patches = ExitStack()
    for name, method in methods.items():
        patches.callback(put_on_instance(owner, name, method))
    return patches


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a method, or if there is nothing to put back."""
