"""The LightningModule: a language model that learns answers."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from typing_extensions import override

from recipes.language.model import load_base
from recipes.language.module import LanguageModel


class InstructionTuning(LanguageModel):
    """A causal language model with LoRA that learns the answers of conversations.

    Args:
        attn_implementation: transformers' name of how attention is computed: "sdpa", "eager", "flash_attention_2" or
            another; None takes the model's default.
        start_from: folder of another run's adapter, whose LoRA weights this one starts from. Only `fit` reads it; a run
            that resumes from a checkpoint may leave it out.
        loraplus_ratio: how many times larger B's learning rate is than A's, which is ``learning_rate``: LoRA+, through
            peft's ``create_loraplus_optimizer``. None trains both at one rate.
        kwargs: of :class:`recipes.language.module.LanguageModel`.

    Raises:
        MisconfigurationException: a ratio below 1.
    """

    def __init__(
        self,
        attn_implementation: str | None = None,
        start_from: str | None = None,
        loraplus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if loraplus_ratio is not None and loraplus_ratio < 1:
            raise MisconfigurationException(f"loraplus_ratio must be >= 1 or null, got {loraplus_ratio!r}")
        self.attn_implementation = attn_implementation
        self.start_from = start_from
        self.loraplus_ratio = loraplus_ratio

    @override
    def load_base(self) -> Any:
        config = None if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return load_base(self.model_name, self.weights_dtype(), self.quantization, config)

    @override
    def new_optimizer(self) -> Optimizer:
        if self.loraplus_ratio is None:
            return super().new_optimizer()
        if self.chosen_optimizer:
            raise MisconfigurationException(
                "loraplus_ratio makes an AdamW of its own: leave out either it or --optimizer"
            )
        optimizer: Optimizer = create_loraplus_optimizer(
            self.net,
            torch.optim.AdamW,
            lr=self.learning_rate,
            loraplus_lr_ratio=self.loraplus_ratio,
            loraplus_weight_decay=self.weight_decay,
            betas=self.betas,
        )
        return optimizer
