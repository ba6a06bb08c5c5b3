"""Take up nothing of what an extra pass logs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch import LightningModule

from lightning_flatlora.callbacks.patches import nothing, put_on_instance


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Inside, nothing that the module or a callback logs is taken up: the first pass has logged already."""
    with ExitStack() as stack:
        stack.callback(put_on_instance(pl_module, "log", nothing))
        trainer = pl_module._trainer
        results = None if trainer is None else trainer._results
        if trainer is not None and results is not None:
            # A loss object, and a callback, hold the method self.log of before, and an override may call super().log.
            # That method also forgets what was logged before by the same hook, if another one has logged since.
            stack.callback(put_on_instance(results, "log", nothing))
            stack.callback(put_on_instance(results, "reset", nothing))
            connector = trainer._logger_connector
            stack.callback(setattr, connector, "_current_fx", connector._current_fx)
        yield
