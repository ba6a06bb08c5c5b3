"""What a checkpoint's run and the run that loads it must agree in."""

import reprlib
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

_KEY = "must_fit"  # of a checkpoint


class FittingModule(L.LightningModule):
    """Refuses checkpoints of another model or other classes, in resuming, evaluation and prediction."""

    def must_fit(self) -> dict[str, Any]:
        """What has to be as it was in the checkpoint's run, by the words for it; known once the model is there."""
        raise NotImplementedError

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = self.must_fit()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare, before the first weight is loaded.

        Raises:
            MisconfigurationException: the checkpoint's run had something else.
        """
        super().on_load_checkpoint(checkpoint)
        # Without a Trainer there are no data, and so no classes.
        if self._trainer is None or _KEY not in checkpoint:
            return
        now = self.must_fit()
        differences = []
        for name, before in checkpoint[_KEY].items():
            if now.get(name) != before:
                differences.append(f"{name}: {_difference(before, now.get(name))}")
        if differences:
            raise MisconfigurationException(
                f"the checkpoint is of a run on something else ({'; '.join(differences)}): give the model and the data "
                "of that run"
            )


def _difference(before: Any, now: Any) -> str:
    """Two values in short; of lists what is in one of them alone, unless they differ in their order.

    Example:
        >>> _difference(["cat", "dog", "fish"], ["cat", "bird", "fish"])
        "['dog'] there, ['bird'] here"
    """
    if isinstance(before, list) and isinstance(now, list) and set(before) != set(now):
        before, now = [one for one in before if one not in now], [one for one in now if one not in before]
    return f"{reprlib.repr(before)} there, {reprlib.repr(now)} here"
