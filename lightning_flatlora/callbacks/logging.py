"""What a callback and a module log: kept out of copies, or not taken up for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_flatlora.patching import nothing, put_on


def without_logging(callback: Callback) -> dict[str, Any]:
    """Give a callback's attributes without Lightning's methods of a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Take up nothing that the module or a callback logs inside: the first pass has logged already."""
    trainer = pl_module.trainer
    with put_on(pl_module, {"log": nothing}) as stack:
        # A loss object, and a callback, hold the method self.log of before, and an override may call super().log.
        # That method also forgets what was logged before by the same hook, if another one has logged since.
        stack.enter_context(put_on(trainer._results, {"log": nothing, "reset": nothing}))
        connector = trainer._logger_connector
        stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield
