"""The LightningModules of prompt mode: the model's own prediction of a word stands for the class."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from typing_extensions import override

from recipes.classification.module import Batch, TextClassifier
from recipes.classification.prompts import is_masked, word_tokens
from recipes.language.model import add_adapter, load_pretrained, weights_dtype
from recipes.shared.training import AutomaticTraining, ManualTraining


class PromptClassifier(TextClassifier):
    """A masked or causal language model with LoRA, which predicts the label word at the mask or after the prompt.

    The data's template decides on the kind: with ``{mask}`` it is for a masked model. The loss is the cross-entropy
    over the label words' logits. With ``lora.modules_to_save: [lm_head]`` the whole head is trained, too, plainly and
    untied from the embeddings.

    Args:
        label_words: a word of one token for each class.
        kwargs: of TextClassifier; the model is one that AutoModelForMaskedLM or AutoModelForCausalLM loads.
    """

    def __init__(self, label_words: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_words = dict(label_words)
        self.word_ids: list[int] = []
        self.is_masked = True

    @override
    def load_net(self) -> PeftModel:
        if self.data.template is None or self.data.regression:
            raise MisconfigurationException("label_words need data with a template and with classes: set data.template")
        self.word_ids = word_tokens(self.label_words, self.data.classes, self.tokenizer)
        self.is_masked = is_masked(self.data.template)
        auto_class = AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM
        base = load_pretrained(auto_class, self.model_name, dtype=weights_dtype(self.trainer.precision))
        base.train()  # from_pretrained gives it in eval mode, where dropout would be off
        if self.lora.get("modules_to_save"):
            untie_head(base)
        return add_adapter(base, self.lora, task_type=None if self.is_masked else "CAUSAL_LM")

    @override
    def logits(self, batch: Batch) -> Tensor:
        """Of the classes' label words, float32, (rows, classes)."""
        assert self.net is not None  # configure_model comes first
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        position_n = batch["position"]
        if not self.is_masked:
            inputs["use_cache"] = False
            if "logits_to_keep" in inspect.signature(self.net.get_base_model().forward).parameters:
                # The head, a large part of a small model's work, runs only where some prompt ends.
                inputs["logits_to_keep"], position_n = torch.unique(position_n, return_inverse=True)
        logits_ntv: Tensor = self.net(**inputs).logits
        rows = torch.arange(len(position_n), device=position_n.device)
        return logits_ntv[rows, position_n][:, self.word_ids].float()


def untie_head(base: Any) -> None:
    """Give the output layer weights of its own, equal to those of the embeddings that it shared until now."""
    output, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if output.weight is embeddings.weight:
        output.weight = nn.Parameter(embeddings.weight.detach().clone())
        base.config.tie_word_embeddings = False


class PromptClassification(PromptClassifier, AutomaticTraining):
    """Automatic optimization: plain LoRA, or with EFMLoRA or FMLoRA among the Trainer's callbacks."""


class PromptClassificationFM(PromptClassifier, ManualTraining):
    """FMLoRA in manual optimization; accumulation and clipping are arguments here, not of the Trainer."""
