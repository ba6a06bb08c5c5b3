"""How a model tells the classes of texts: by a new head, or by its own prediction of a word for each class."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from recipes.classification.data import TextData
from recipes.classification.prompts import is_masked, word_tokens
from recipes.language.batches import padding_id
from recipes.language.model import DType, add_adapter, is_head, load_pretrained

Batch = dict[str, Tensor]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class NewHead:
    """A new layer for the classes or the number, which is trained plainly beside the adapter."""

    def load(self, model: str, lora: dict[str, Any], dtype: DType, data: TextData, tokenizer: Any) -> PeftModel:
        """The pretrained model with the adapter and the head.

        Args:
            model: its name.
            lora: fields of peft's LoraConfig.
            dtype: of the frozen weights.
            data: with the classes.
            tokenizer: the model's.

        Raises:
            MisconfigurationException: the data have a template, which is for label words.
        """
        if data.template is not None:
            raise MisconfigurationException(
                f"template={data.template!r} is for a model that predicts label words: set model.label_words, or "
                "data.template to null for a new head"
            )
        names = data.classes or ["number"]
        base, found = load_pretrained(
            AutoModelForSequenceClassification,
            model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
            dtype=dtype,
            ignore_mismatched_sizes=True,  # the head of a checkpoint with other classes
            output_loading_info=True,
        )
        base.config.pad_token_id = padding_id(tokenizer)  # a decoder's head reads the last token before these
        base.train()  # from_pretrained gives it in eval mode, where dropout would be off
        # Besides the head, such as the pooler of DeBERTa, which its checkpoint leaves to be trained.
        new = {name.rpartition(".")[0] for name in found["missing_keys"]} - {""}
        return add_adapter(base, lora, task_type="SEQ_CLS", new=[name for name in sorted(new) if not is_head(name)])

    def logits(self, net: PeftModel, batch: Batch) -> Tensor:
        """Of the classes, or the number, float32, (rows, classes or 1)."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        logits: Tensor = net(**inputs).logits
        return logits.float()


class LabelWords:
    """The word that a masked model predicts at the mask, or a causal one after the prompt.

    The data's template decides on the kind: with ``{mask}`` it is for a masked model. With ``lora.modules_to_save:
    [lm_head]`` the whole head is trained, too, plainly and untied from the embeddings.

    Args:
        words: one of a single token for each class.
    """

    def __init__(self, words: Mapping[str, str]) -> None:
        self.words = dict(words)
        self.word_ids: list[int] = []
        self.is_masked = True

    def load(self, model: str, lora: dict[str, Any], dtype: DType, data: TextData, tokenizer: Any) -> PeftModel:
        """The pretrained model with the adapter; the arguments are those of :meth:`NewHead.load`.

        Raises:
            MisconfigurationException: the data have no template or no classes, or a word is not one token.
        """
        if data.template is None or data.regression:
            raise MisconfigurationException("label_words need data with a template and with classes: set data.template")
        self.word_ids = word_tokens(self.words, data.classes, tokenizer)
        self.is_masked = is_masked(data.template)
        base = load_pretrained(AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM, model, dtype=dtype)
        base.train()  # from_pretrained gives it in eval mode, where dropout would be off
        if lora.get("modules_to_save"):
            untie_head(base)
        return add_adapter(base, lora, task_type=None if self.is_masked else "CAUSAL_LM")

    def logits(self, net: PeftModel, batch: Batch) -> Tensor:
        """Of the classes' words, float32, (rows, classes)."""
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        position_n = batch["position"]
        if not self.is_masked:
            inputs["use_cache"] = False
            if "logits_to_keep" in inspect.signature(net.get_base_model().forward).parameters:
                # The head, a large part of a small model's work, runs only where some prompt ends.
                inputs["logits_to_keep"], position_n = torch.unique(position_n, return_inverse=True)
        logits_ntv: Tensor = net(**inputs).logits
        rows = torch.arange(len(position_n), device=position_n.device)
        return logits_ntv[rows, position_n][:, self.word_ids].float()


def untie_head(base: Any) -> None:
    """Give the output layer weights of its own, equal to those of the embeddings that it shared until now."""
    output, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if output.weight is embeddings.weight:
        output.weight = nn.Parameter(embeddings.weight.detach().clone())
        base.config.tie_word_embeddings = False
