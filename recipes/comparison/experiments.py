"""An idea beyond the paper that the comparison tries: on one device, with batches that are a dict of tensors."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_flatlora import FMLoRA
from lightning_flatlora.callbacks.two_passes import put_on_instance


class PartialFMLoRA(FMLoRA):
    """FMLoRA whose first pass sees only the first examples of a batch: a step costs 1 + part times LoRA's."""

    def __init__(self, rho: float, part: float) -> None:
        super().__init__(rho)
        self.part = part

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._step_arguments is None:
            return
        original, cancel = pl_module.training_step, self._cancel

        def training_step(batch: Any, *rest: Any) -> Any:
            return original(batch if self._in_second_pass else self._first(batch), *rest)

        put_back = put_on_instance(pl_module, "training_step", training_step)

        def cancel_both() -> None:
            put_back()
            cancel()

        self._cancel = cancel_both

    def _first(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        kept = max(1, round(self.part * size))
        return {k: v[:kept] if isinstance(v, Tensor) and len(v) == size else v for k, v in batch.items()}
