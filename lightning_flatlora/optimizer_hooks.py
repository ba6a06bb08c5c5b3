"""The hooks of an optimizer, also of one that libraries have wrapped, or whose class does not call all of them."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

TakeState = Callable[[Optimizer, dict[str, Any]], None]


def innermost(optimizer: Any) -> Any:
    """Give the optimizer of PyTorch in what Fabric, accelerate or a method over another one has made of it."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def before_loading(optimizer: Optimizer, take: TakeState) -> Any:
    """Call a function with each state that an optimizer is to load.

    Returns:
        A handle, whose ``remove`` ends that.
    """
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        return optimizer.register_load_state_dict_pre_hook(take)
    return _LoadOverride(optimizer, take)


class _LoadOverride:
    """Lies over ``load_state_dict`` of one optimizer: those of bitsandbytes, among others, load without the hooks."""

    def __init__(self, optimizer: Optimizer, take: TakeState) -> None:
        self._optimizer, self._take = optimizer, take
        self._is_removed = False
        self._before = optimizer.__dict__.get("load_state_dict")
        self._own = optimizer.load_state_dict
        optimizer.load_state_dict = self  # type: ignore[method-assign]

    def __call__(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_removed:
            self._take(self._optimizer, state_dict)
        return self._own(state_dict, *args, **kwargs)

    def remove(self) -> None:
        """Give the optimizer its own method back, or only pass on if another override lies over this one."""
        self._is_removed = True
        if self._optimizer.__dict__.get("load_state_dict") is self:
            del self._optimizer.__dict__["load_state_dict"]
            if self._before is not None:
                self._optimizer.__dict__["load_state_dict"] = self._before
