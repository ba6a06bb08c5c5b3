"""Two ways to predict a text's class: by a new head, or by a label word for each class."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from recipes.language.model import DType, add_adapter, is_head, load_pretrained

Batch = dict[str, Tensor]


def load_with_head(model: str, lora: dict[str, Any], dtype: DType, names: Sequence[str], pad_id: int) -> PeftModel:
    """Return the pretrained model with the adapter and a new head, which is trained without perturbation.

    Args:
        model: name of the model.
        lora: fields of peft's LoraConfig.
        dtype: dtype of the frozen weights.
        names: names of the head's outputs.
        pad_id: token that pads short rows.
    """
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
    base.config.pad_token_id = pad_id  # a decoder's head reads the last token before these
    base.train()  # from_pretrained returns it in eval mode, where dropout would be off
    # Modules besides the head that the checkpoint leaves to be trained, such as DeBERTa's pooler.
    new = {name.rpartition(".")[0] for name in found["missing_keys"]} - {""}
    return add_adapter(base, lora, task_type="SEQ_CLS", new=[name for name in sorted(new) if not is_head(name)])


def head_logits(net: PeftModel, batch: Batch) -> Tensor:
    """Return the head's logits, float32, (rows, outputs)."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    logits: Tensor = net(**{name: batch[name] for name in names if name in batch}).logits
    return logits.float()


def load_for_words(model: str, lora: dict[str, Any], dtype: DType, is_masked: bool) -> PeftModel:
    """Return the pretrained model with the adapter, to predict a word at a mask or, if causal, after a prompt.

    With ``modules_to_save: [lm_head]`` in ``lora`` the whole head is trained too, without perturbation and untied from
    the embeddings. For the other arguments see :func:`load_with_head`.
    """
    base = load_pretrained(AutoModelForMaskedLM if is_masked else AutoModelForCausalLM, model, dtype=dtype)
    base.train()  # from_pretrained returns it in eval mode, where dropout would be off
    if lora.get("modules_to_save"):
        _untie_head(base)
    return add_adapter(base, lora, task_type=None if is_masked else "CAUSAL_LM")


def word_logits(net: PeftModel, batch: Batch, word_ids: Sequence[int], is_masked: bool) -> Tensor:
    """Return the logits of the classes' words, float32, (rows, classes)."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    position_n = batch["position"]
    if not is_masked:
        inputs["use_cache"] = False
        if "logits_to_keep" in inspect.signature(net.get_base_model().forward).parameters:
            # The head, a large part of a small model's work, runs only at positions where a prompt ends.
            inputs["logits_to_keep"], position_n = torch.unique(position_n, return_inverse=True)
    logits_ntv: Tensor = net(**inputs).logits
    rows = torch.arange(len(position_n), device=position_n.device)
    return logits_ntv[rows, position_n][:, word_ids].float()


def _untie_head(base: Any) -> None:
    """Give the output layer its own copy of the weights that it shared with the embeddings."""
    output, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if output.weight is embeddings.weight:
        output.weight = nn.Parameter(embeddings.weight.detach().clone())
        base.config.tie_word_embeddings = False
