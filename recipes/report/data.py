"""Examples of a file as batches of fixed tokens, and a model's mean loss on them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from lightning_flatlora.flatness import MeanLoss
from recipes.data.reading import read_table
from recipes.language.chat import IGNORED, ChatEncoder
from recipes.language.model import answer_log_likelihood
from recipes.report.adapters import Adapted
from recipes.report.options import Options

_COLUMNS = {
    "CAUSAL_LM": (("messages",), ("prompt", "completion"), ("text",)),
    "SEQ_CLS": (("text", "label"),),
}

Row = dict[str, Any]


def read_rows(options: Options) -> list[Row]:
    """Read examples of ``--data``, drawn with the seed.

    Raises:
        MisconfigurationException: the file can't be read.
    """
    table = read_table(str(options.data), "train")
    number = min(options.examples, len(table))
    rows: list[Row] = table.shuffle(seed=options.seed).select(range(number)).to_list()
    return rows


def columns_for(task: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """Choose the columns to read for a task: the first of its kinds that the data have.

    Example:
        >>> columns_for("CAUSAL_LM", [{"text": "a", "prompt": "b", "completion": "c"}])
        ('prompt', 'completion')
    """
    for columns in _COLUMNS[task]:
        if all(column in rows[0] for column in columns):
            return columns
    allowed = " or ".join(" and ".join(columns) for columns in _COLUMNS[task])
    raise MisconfigurationException(f"--data has the columns {', '.join(rows[0])}; a {task} adapter needs {allowed}")


def mean_loss(adapted: Adapted, rows: Sequence[Row], options: Options) -> tuple[MeanLoss, int]:
    """Make the cross-entropy as a mean over all tokens that count (causal language models) or examples (classifiers).

    Args:
        adapted: the model.
        rows: the data's.
        options: batch size and length.

    Returns:
        The loss, which the split into batches changes only by rounding, and the number of terms of its mean.

    Raises:
        MisconfigurationException: a row that can't be encoded, or no token that counts.
    """
    columns = columns_for(adapted.task, rows)
    chat = None
    if "messages" in columns:
        chat = ChatEncoder(adapted.tokenizer, options.max_length, options.chat_template)
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(_encoded(row, adapted, columns, chat, options.max_length))
        except (MisconfigurationException, ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise MisconfigurationException(f"--data: example {number} of those drawn: {error!r:.300}") from error
    # A prompt that fills the whole length leaves nothing to predict.
    examples = [example for example in examples if terms_of(example)]
    if not examples:
        raise MisconfigurationException(
            f"--data: no token counts within --max_length {options.max_length}: take a larger one, if the examples "
            "have an answer at all (a completion, or a message of the assistant)"
        )
    # Of similar length, so that little is computed for padding.
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    collators = {"CAUSAL_LM": DataCollatorForTokenClassification, "SEQ_CLS": DataCollatorWithPadding}
    collate = collators[adapted.task](adapted.tokenizer)
    batches = []
    for start in range(0, len(examples), options.batch_size):
        batches.append(collate(examples[start : start + options.batch_size]).to(options.torch_device))
    total = sum(terms_of(example) for example in examples)
    # MeanLoss divides by the number of batches, while the mean over all terms is wanted.
    weight = len(batches) / total
    return MeanLoss([partial(_weighted_loss, adapted.model, batch, weight) for batch in batches]), total


def terms_of(example: Row) -> int:
    """Count the terms that the loss has: tokens that count and have one before them, or one for the class of a text."""
    labels = example["labels"]
    if isinstance(labels, int):
        return min(1, len(example["input_ids"]))  # some tokenizers make no token of an empty text
    return sum(label != IGNORED for label in labels[1:])


def _encoded(
    row: Row, adapted: Adapted, columns: tuple[str, ...], chat: ChatEncoder | None, max_length: int
) -> dict[str, Any]:
    """Return the tokens of a row, and a label for each (-100 where the loss does not count it), or the row's class."""
    if chat is not None:
        conversation = chat.encode(row["messages"])
        return {"input_ids": conversation.input_ids, "labels": conversation.labels}
    prompt, text = "", row[columns[-1]]
    if "completion" in columns:
        prompt = row["prompt"]
        text = prompt + text + (adapted.tokenizer.eos_token or "")
    elif "label" in columns:
        text = row["text"]
    tokens = adapted.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_length)
    ids = tokens["input_ids"]
    if "label" in columns:
        return {"input_ids": ids, "labels": class_of(row["label"], adapted.model.config.label2id)}
    # The tokenizer gives special tokens that it adds itself the span (0, 0).
    counts = [end > len(prompt) for _, end in tokens["offset_mapping"]]
    return {"input_ids": ids, "labels": [token if is_in else IGNORED for token, is_in in zip(ids, counts, strict=True)]}


def class_of(label: object, names: dict[str, int]) -> int:
    """Find the number of a class, given as a number or by its name in the model's configuration.

    Raises:
        ValueError: there is no such class.
    """
    number = names.get(label, label)  # type: ignore[call-overload]
    # JSON's true and 1.0, as pandas writes it, are in it too.
    if number not in range(len(names)):
        raise ValueError(f"label must be a number from 0 to {len(names) - 1} or one of {list(names)}, got {label!r}")
    return int(number)


def _weighted_loss(model: PeftModel, batch: dict[str, Tensor], weight: float) -> Tensor:
    """Return the sum of a batch's cross-entropy times a weight, in nats, float32 or wider."""
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if labels.ndim == 2:
        log_likelihood, _ = answer_log_likelihood(model, inputs, labels)
        return -log_likelihood.sum() * weight
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * weight
