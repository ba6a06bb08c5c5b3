"""What the LightningModules of all recipes do alike."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import ReduceLROnPlateau, instantiate_class
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override


class RecipeModule(L.LightningModule):
    """Trains with AdamW and a schedule that spans the run, or what was chosen instead; clips by norm under FSDP1 too.

    Attributes:
        chosen_optimizer: in place of AdamW, as LightningCLI gives it: ``class_path`` and ``init_args``. It gets the
            same parameters; ``learning_rate`` and ``weight_decay`` have no effect then.
        chosen_scheduler: in place of the recipe's schedule, likewise; stepped once an epoch, as LightningCLI does.
    """

    learning_rate: float
    weight_decay: float
    chosen_optimizer: Any = None
    chosen_scheduler: Any = None

    def own_schedule(self, optimizer: Optimizer) -> LRScheduler:
        """The recipe's schedule, which is stepped with every optimizer step."""
        raise NotImplementedError

    def parameter_groups(self) -> list[Any]:
        """What the optimizer gets: trained parameters, or groups of them."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @override
    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        if self.chosen_optimizer:
            optimizer = instantiate_class(groups, self.chosen_optimizer)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        if not self.chosen_scheduler:
            config = {"scheduler": self.own_schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": config}
        scheduler = instantiate_class(optimizer, self.chosen_scheduler)
        config = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

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
