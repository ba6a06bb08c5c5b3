"""The upper layers of an encoder with LoRA and a new head, trained on kept states of the lower ones."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from recipes.evidence.data import Batch
from recipes.evidence.encoder import CutEncoder, pooled
from recipes.evidence.workloads import Config, Settings
from recipes.shared.training import RecipeModule

_CHECKS = 20  # of the validation loss in a run


class ShotsClassifier(RecipeModule):
    """Classes of texts from the mean over the tokens.

    Args:
        encoder: whose upper layers get LoRA.
        classes: their number.
        settings: of the workload.
        config: ``learning_rate`` (AdamW's at its highest), and perhaps ``weight_decay``, ``dropout`` (the adapter's),
            ``label_smoothing`` and ``rank``.

    Attributes:
        has_failed: a loss was not finite.
    """

    def __init__(self, encoder: CutEncoder, classes: int, settings: Settings, config: Config) -> None:
        super().__init__()
        self.learning_rate = config["learning_rate"]
        self.weight_decay = config.get("weight_decay", 0.0)
        self.warmup_share = settings["warmup_share"]
        self.label_smoothing = config.get("label_smoothing", 0.0)
        self.has_failed = False
        rank = config.get("rank", settings["rank"])
        lora = LoraConfig(
            r=rank,
            # s stays the same at another rank, so that only the rank differs.
            lora_alpha=settings["scaling"] * rank,
            lora_dropout=config.get("dropout", 0.0),
            target_modules=settings["targets"],
        )
        self.net = get_peft_model(encoder.upper(), lora)
        self.head = nn.Linear(encoder.width, classes)

    @property
    def adapted_layers(self) -> list[Any]:
        """peft's layers, each with W = W0 + s B A."""
        return [layer for layer in self.net.modules() if isinstance(layer, LoraLayer)]

    def logits(self, batch: Batch) -> Tensor:
        """Of the classes, float32, (n, classes)."""
        hidden = self.net(batch["hidden"], batch["owners"])
        # In bfloat16 the logits of different classes would often be equal.
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.head(pooled(hidden, batch["owners"], len(batch["labels"])))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch["labels"], label_smoothing=self.label_smoothing)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not math.isfinite(outputs["loss"]):
            # The run counts with chance's accuracy: a method that diverges must not be left out of its own mean.
            self.has_failed = True
            self.trainer.should_stop = True

    @override
    def new_optimizer(self) -> Optimizer:
        # Fused, because on layers this small starting an operation takes longer than its arithmetic.
        return torch.optim.AdamW(
            self.parameter_groups(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )


def all_logits(module: ShotsClassifier, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) of all examples, without dropout, in the precision of training."""
    with module.trainer.precision_plugin.forward_context():
        return plain_logits(module, batches)


@torch.no_grad()
def plain_logits(module: ShotsClassifier, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """The same in the precision of the weights, for a module without a trainer."""
    module.eval()
    logits = [module.logits(batch) for batch in batches]
    module.train()
    return torch.cat(logits), torch.cat([batch["labels"] for batch in batches])


class BestOnValidation(L.Callback):
    """Looks at the validation loss twenty times in a run, and keeps the weights that had the lowest.

    Args:
        batches: of the validation part.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._least = math.inf
        self._best: dict[str, Tensor] = {}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ShotsClassifier)
        every = max(1, int(trainer.estimated_stepping_batches) // _CHECKS)
        # By steps and not by epochs, since the whole run is one epoch of the loader.
        if trainer.global_step % every:
            return
        loss = float(nn.functional.cross_entropy(*all_logits(pl_module, self.batches)))
        if loss < self._least:
            self._least = loss
            self._best = {name: p.detach().clone() for name, p in trained_parameters(pl_module).items()}

    @torch.no_grad()
    def restore(self, module: ShotsClassifier) -> None:
        """Put these weights into the module."""
        for name, parameter in trained_parameters(module).items():
            if name in self._best:
                parameter.copy_(self._best[name])


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's and the head's, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
