"""Logging of callbacks and modules: keep it out of copies, or silence it for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_flatlora.patching import nothing, put_on


def without_logging(callback: Callback) -> dict[str, Any]:
    """Return a callback's attributes without the methods that Lightning sets for a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Ignore everything that the module or a callback logs inside: the first pass has logged it already."""
    trainer = pl_module.trainer
    with put_on(pl_module, {"log": nothing}) as stack:
        # A loss object or a callback may hold the former method self.log, and an override may call super().log. That
        # method also forgets what this hook has logged before, if another hook has logged since.
        stack.enter_context(put_on(trainer._results, {"log": nothing, "reset": nothing}))
        connector = trainer._logger_connector
        stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield
