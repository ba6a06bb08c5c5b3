"""Take up nothing of what an extra pass logs."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule

from lightning_flatlora.callbacks.patches import nothing, put_on


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Inside, nothing that the module or a callback logs is taken up: the first pass has logged already."""
    with put_on(pl_module, {"log": nothing}) as stack:
        trainer = pl_module._trainer
        results = None if trainer is None else trainer._results
        if trainer is not None and results is not None:
            # A loss object, and a callback, hold the method self.log of before, and an override may call super().log.
            # That method also forgets what was logged before by the same hook, if another one has logged since.
            stack.enter_context(put_on(results, {"log": nothing, "reset": nothing}))
            connector = trainer._logger_connector
            stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield
