"""What the LightningModules of all recipes do alike."""

import math

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override


class RecipeModule(L.LightningModule):
    """Counts the steps that a learning rate schedule spreads over, and clips by norm under FSDP1 too."""

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run; FMLoRA's module accumulates unseen by the trainer.

        Raises:
            MisconfigurationException: the run has no end.
        """
        batches = self.trainer.estimated_stepping_batches
        if math.isinf(batches):
            raise MisconfigurationException(
                "the learning rate's schedule spreads over the run, which has no end: set max_steps or max_epochs"
            )
        return math.ceil(batches / getattr(self, "accumulate_grad_batches", 1))

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        model = self.trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm != "value":
            model.clip_grad_norm_(gradient_clip_val)  # over all ranks; Lightning refuses it
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
