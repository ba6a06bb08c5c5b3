"""The LightningModule: a language model that learns answers."""

from typing import Any

from typing_extensions import override

from recipes.language.model import load_base
from recipes.language.module import LanguageModel


class InstructionTuning(LanguageModel):
    """A causal language model with LoRA that learns the answers of conversations.

    Args:
        attn_implementation: attention implementation in transformers: "sdpa", "eager", "flash_attention_2" or another;
            None takes the model's default.
        start_from: folder of another run's adapter, whose LoRA weights this run starts from. Only `fit` reads it; a run
            resumed from a checkpoint may omit it.
        kwargs: the model's and the optimizer's settings, see :class:`recipes.language.module.LanguageModel`.
    """

    def __init__(self, attn_implementation: str | None = None, start_from: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn_implementation = attn_implementation
        self.start_from = start_from

    @override
    def load_base(self) -> Any:
        config = None if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return load_base(self.model_name, self.weights_dtype(), self.quantization, config)
