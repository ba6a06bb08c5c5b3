"""Take up nothing of what an extra pass logs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Inside, nothing that the module or a callback logs is taken up: the first pass has logged already."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(pl_module, "log"))
        trainer = pl_module._trainer
        results = None if trainer is None else trainer._results
        if trainer is not None and results is not None:
            # A loss object, and a callback, hold the method self.log of before, and an override may call super().log.
            # That method also forgets what was logged before by the same hook, if another one has logged since.
            stack.enter_context(_replaced(results, "log"))
            stack.enter_context(_replaced(results, "reset"))
            connector = trainer._logger_connector
            stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield


@contextmanager
def _replaced(owner: Any, name: str) -> Iterator[None]:
    """Inside, one object's method does nothing."""
    # Past __setattr__, which torch's modules define.
    attributes = owner.__dict__
    was_replaced, former = name in attributes, attributes.get(name)
    attributes[name] = _do_nothing
    try:
        yield
    finally:
        if was_replaced:
            attributes[name] = former
        else:
            del attributes[name]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand where there is nothing to log."""
