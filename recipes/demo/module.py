"""The trained module: the upper layers of an encoder with LoRA, and a new head."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from recipes.demo.data import Batch
from recipes.demo.encoder import CutEncoder, pooled
from recipes.training.module import RecipeModule

_RANK = 8


class TaskClassifier(RecipeModule):
    """Classifies texts by the mean over their tokens.

    Args:
        encoder: the one whose upper layers get LoRA.
        classes: their number.
        learning_rate: AdamW's highest learning rate.
        dropout: probability, on the adapter's input.
    """

    validation_step = None  # type: ignore[assignment]  # Lightning warns of one without data

    def __init__(self, encoder: CutEncoder, classes: int, learning_rate: float, dropout: float = 0.0) -> None:
        super().__init__(learning_rate, warmup_share=0.06)
        lora = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, lora_dropout=dropout, target_modules=["query", "value"])
        self.net = get_peft_model(encoder.upper(), lora)
        self.head = nn.Linear(encoder.width, classes)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the classes, float32, (n, classes)."""
        hidden = self.net(batch["hidden"], batch["owners"])
        # In bfloat16 the logits of different classes would often be equal.
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.head(pooled(hidden, batch["owners"], len(batch["labels"])))
        return logits

    @override
    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch["labels"])

    @override
    def new_optimizer(self) -> Optimizer:
        # Fused, because on layers this small starting an operation takes longer than its arithmetic.
        return torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate, weight_decay=0.0, fused=True)
