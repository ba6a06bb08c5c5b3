"""Examples of a file as batches of fixed tokens, and a model's mean loss on them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor

from lightning_flatlora.flatness import MeanLoss
from recipes.language.batches import pad, padding_id
from recipes.language.chat import IGNORED, ChatEncoder
from recipes.language.model import answer_log_likelihood
from recipes.report.adapters import Adapted, first_line
from recipes.report.options import Options
from recipes.shared.data import read_table

_COLUMNS = {
    "CAUSAL_LM": (("messages",), ("prompt", "completion"), ("text",)),
    "SEQ_CLS": (("text", "label"),),
}

Row = dict[str, Any]


class Encoded(NamedTuple):
    """An example: its tokens, and a label for each (-100 where the loss does not count it), or its class."""

    input_ids: list[int]
    labels: list[int] | int

    @property
    def terms(self) -> int:
        """How many terms the loss has: tokens that count and have one before them, or one for the class of a text."""
        if isinstance(self.labels, int):
            return min(1, len(self.input_ids))  # some tokenizers make no token of an empty text
        return sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """The inputs, (rows, T), and what the model must predict: classes (rows,), or tokens (rows, T), -100 left out."""

    inputs: dict[str, Tensor]
    labels: Tensor


def read_rows(options: Options) -> list[Row]:
    """Read examples of ``--data``, drawn with the seed.

    Raises:
        MisconfigurationException: the file can't be read.
    """
    try:
        table = read_table(str(options.data), "train")
    except MisconfigurationException as error:
        raise MisconfigurationException(f"--data: {error}") from error
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
        rows: of the data.
        options: batch size and length.

    Returns:
        The loss, which the split into batches changes by rounding alone, and the number of terms of its mean.

    Raises:
        MisconfigurationException: a row that can't be encoded, or no token that counts.
    """
    _check_classes(adapted)
    encoder = Encoder(adapted, columns_for(adapted.task, rows), options)
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(encoder.encode(row))
        except MisconfigurationException as error:
            raise MisconfigurationException(f"--data: example {number} of those drawn: {error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise MisconfigurationException(f"--data: example {number} of those drawn: {first_line(error)}") from error
    # A prompt that fills the whole length leaves nothing to predict.
    examples = [example for example in examples if example.terms]
    if not examples:
        raise MisconfigurationException(
            f"--data: no token counts within --max_length {options.max_length}: take a larger one, if the examples "
            "have an answer at all (a completion, or a message of the assistant)"
        )
    batches = _batches(examples, adapted, options)
    total = sum(example.terms for example in examples)
    # MeanLoss divides by the number of batches, while the mean over all terms is wanted.
    weight = len(batches) / total
    return MeanLoss([partial(_weighted_loss, adapted.model, batch, weight) for batch in batches]), total


class Encoder:
    """Encode rows as tokens with a label for each, or with their class.

    Args:
        adapted: whose tokenizer and classes are taken.
        columns: of the rows, from :func:`columns_for`.
        options: tokens kept of an example, and the chat template.

    Raises:
        MisconfigurationException: the rows hold messages, and the chat template can't be used.
    """

    def __init__(self, adapted: Adapted, columns: tuple[str, ...], options: Options) -> None:
        self._tokenizer = adapted.tokenizer
        self._classes = adapted.model.config.label2id
        self._columns = columns
        self._max_length = options.max_length
        self._chat: ChatEncoder | None = None
        if "messages" in columns:
            self._chat = ChatEncoder(adapted.tokenizer, options.max_length, options.chat_template)

    def encode(self, row: Row) -> Encoded:
        """Encode one row."""
        if self._chat is not None:
            encoded = self._chat.encode(row["messages"])
            return Encoded(encoded.input_ids, encoded.labels)
        prompt = ""
        if "prompt" in self._columns:
            prompt = _string(row["prompt"])
            text = prompt + _string(row["completion"]) + (self._tokenizer.eos_token or "")
        else:
            text = _string(row["text"])
        tokens = self._tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=self._max_length)
        ids = tokens["input_ids"]
        if "label" in self._columns:
            return Encoded(ids, class_of(row["label"], self._classes))
        labels = []
        for token, (_, end) in zip(ids, tokens["offset_mapping"], strict=True):
            # The tokenizer gives special tokens that it adds itself the place (0, 0).
            labels.append(token if end > len(prompt) else IGNORED)
        return Encoded(ids, labels)


def class_of(label: object, names: dict[str, int]) -> int:
    """Find the number of a class, given as such or by the name that the model's configuration has for it.

    Raises:
        ValueError: there is no such class.
    """
    number = label
    if isinstance(label, str):
        # A CSV file holds texts, also where they are numbers.
        number = int(label) if label.isdecimal() and label not in names else names.get(label)
    if isinstance(label, (bool, float)) and float(label).is_integer():  # JSON's true, and 1.0 as pandas writes it
        number = int(label)
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise ValueError(f"label must be a number from 0 to {len(names) - 1} or one of {list(names)}, got {label!r}")
    return number


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text must be a string, got {value!r}")
    return value


def _check_classes(adapted: Adapted) -> None:
    """Refuse what has no classes of which each text is in one, since its loss is another."""
    config = adapted.model.config
    is_regression = config.num_labels == 1 or config.problem_type == "regression"
    if adapted.task == "SEQ_CLS" and (is_regression or config.problem_type == "multi_label_classification"):
        what = "predicts numbers" if is_regression else "gives a text several classes at once"
        raise MisconfigurationException(
            f"the adapter of {adapted.base} {what}: the report measures the cross-entropy of one class alone"
        )


def _weighted_loss(model: PeftModel, batch: Batch, weight: float) -> Tensor:
    """The sum of a batch's cross-entropy times a weight, in nats, float32 or wider."""
    if batch.labels.ndim == 2:
        log_likelihood, _ = answer_log_likelihood(model, batch.inputs, batch.labels)
        return -log_likelihood.sum() * weight
    logits = model(**batch.inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum") * weight


def _batches(examples: list[Encoded], adapted: Adapted, options: Options) -> list[Batch]:
    """Batches of similar length, padded on the right."""
    # So that little is computed for padding.
    examples = sorted(examples, key=lambda example: len(example.input_ids))
    chunks = [examples[start : start + options.batch_size] for start in range(0, len(examples), options.batch_size)]
    return [_batch(chunk, padding_id(adapted.tokenizer), options.torch_device) for chunk in chunks]


def _batch(chunk: list[Encoded], pad_id: int, device: torch.device) -> Batch:
    ids = [torch.tensor(example.input_ids, dtype=torch.long) for example in chunk]
    inputs = {"input_ids": pad(ids, pad_id), "attention_mask": pad([torch.ones_like(row) for row in ids], 0)}
    labels = [torch.tensor(example.labels) for example in chunk]
    together = torch.stack(labels) if labels[0].ndim == 0 else pad(labels, IGNORED)
    return Batch({name: value.to(device) for name, value in inputs.items()}, together.to(device))
