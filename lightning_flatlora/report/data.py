"""Examples of a file as batches of fixed tokens, and a model's mean loss on them."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor

from lightning_flatlora.flatness import Loss, MeanLoss
from lightning_flatlora.report.adapters import Adapted, first_line, padding
from lightning_flatlora.report.conversation import answer_spans
from lightning_flatlora.report.options import Options, ReportError

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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
        """How many terms the loss has: tokens that count and have one before them, or one for a class."""
        return 1 if isinstance(self.labels, int) else sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """What a model takes, (rows, T), and what it has to tell: classes (rows,), or tokens (rows, T), -100 left out."""

    inputs: dict[str, Tensor]
    labels: Tensor


def read_rows(options: Options) -> list[Row]:
    """Examples of ``--data``, drawn with the seed.

    Raises:
        ReportError: the file can't be read.
    """
    path: Path = options.data
    if path.suffix not in _FORMATS:
        raise ReportError(f"--data {path}: its name must end in {', '.join(_FORMATS)}")
    try:
        rows = _drawn(path, options.examples, options.seed)
    except StopIteration:  # the JSON reader's, of a file without a byte
        rows = []
    except Exception as error:  # the readers of four formats raise what they like
        raise ReportError(f"--data {path} can't be read ({first_line(error.__cause__ or error)})") from error
    if not rows:
        raise ReportError(f"--data {path} is empty")
    return rows


def _drawn(path: Path, number: int, seed: int) -> list[Row]:
    """So many rows of a file in random order, through a cache that goes with the call, in silence."""
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            read = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=cache)
            rows: list[Row] = read.shuffle(seed=seed).select(range(min(number, len(read)))).to_list()
            return rows
    finally:
        if not silent:
            datasets.enable_progress_bars()


def columns_for(task: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns to read for a task: the first of its kinds that the data have.

    Example:
        >>> columns_for("CAUSAL_LM", [{"text": "a", "prompt": "b", "completion": "c"}])
        ('prompt', 'completion')
    """
    for columns in _COLUMNS[task]:
        if all(column in rows[0] for column in columns):
            return columns
    allowed = " or ".join(" and ".join(columns) for columns in _COLUMNS[task])
    raise ReportError(f"--data has the columns {', '.join(rows[0])}; a {task} adapter needs {allowed}")


def mean_loss(adapted: Adapted, rows: Sequence[Row], options: Options) -> tuple[MeanLoss, int]:
    """The cross-entropy as a mean over all tokens that count (causal language models) or examples (classifiers).

    Args:
        adapted: the model.
        rows: of the data.
        options: batch size and length.

    Returns:
        The loss, which how examples share batches changes by rounding alone; and over how many terms its mean is.

    Raises:
        ReportError: a row that can't be encoded, or no token that counts.
    """
    columns = columns_for(adapted.task, rows)
    encode = _encoder(adapted, columns, options.max_length)
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(encode(*(row[column] for column in columns)))
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise ReportError(f"--data: example {number} of those drawn: {first_line(error)}") from error
    examples = [example for example in examples if example.terms]
    if not examples:
        raise ReportError(f"--data: no token counts within --max_length {options.max_length}: take a larger one")
    batches = _batches(examples, adapted, options)
    total = sum(example.terms for example in examples)

    def part(batch: Batch) -> Loss:
        return lambda: _total_loss(adapted.model, batch) * (len(batches) / total)

    return MeanLoss([part(batch) for batch in batches]), total


def _total_loss(model: PeftModel, batch: Batch) -> Tensor:
    """The sum of a batch's cross-entropy, in nats, float32 or wider."""
    if batch.labels.ndim == 1:
        logits, labels = model(**batch.inputs).logits, batch.labels
    else:
        logits, labels = _next_tokens(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _next_tokens(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (K, V) and tokens (K,), only where some row counts: most of a prompt never meets the large head."""
    labels = batch.labels[:, 1:]  # each token is told by the one before it
    kept = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(**batch.inputs, use_cache=False).logits[:, kept]
    return logits.flatten(0, 1), labels[:, kept].flatten()


def _encoder(adapted: Adapted, columns: tuple[str, ...], max_length: int) -> Callable[..., Encoded]:
    tokenizer = adapted.tokenizer
    if "label" in columns:
        names = adapted.model.config.label2id
        return lambda text, label: Encoded(
            tokenizer(_string(text), truncation=True, max_length=max_length)["input_ids"], _class(label, names)
        )
    if "messages" in columns:
        if not tokenizer.chat_template:
            raise ReportError(f"--data has messages, but the tokenizer of {adapted.base} has no chat template")
        return lambda messages: _located(tokenizer, *chat(tokenizer, messages), max_length, special=False)
    if "prompt" in columns:
        end = tokenizer.eos_token or ""
        return lambda prompt, completion: _located(
            tokenizer, _string(prompt) + _string(completion) + end, [(len(prompt), len(prompt + completion + end))],
            max_length,
        )  # fmt: skip
    return lambda text: _located(tokenizer, _string(text), [(0, len(text))], max_length)


def chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation through the chat template, and where in it the assistant's answers lie, with their end tokens."""

    def render(some: Sequence[dict[str, str]], opened: bool) -> str:
        return str(tokenizer.apply_chat_template(list(some), tokenize=False, add_generation_prompt=opened))

    return answer_spans(render, messages, tokenizer.eos_token)


def _located(tokenizer: Any, text: str, spans: list[tuple[int, int]], max_length: int, special: bool = True) -> Encoded:
    """Tokens of a text; those that lie in one of the spans of characters count."""
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    ids = encoded["input_ids"]
    counts = [any(a < end and start < b for a, b in spans) for start, end in encoded["offset_mapping"]]
    return Encoded(ids, [token if counted else IGNORED for token, counted in zip(ids, counts, strict=True)])


def _batches(examples: list[Encoded], adapted: Adapted, options: Options) -> list[Batch]:
    """Batches of similar length, padded on the right."""
    examples = sorted(examples, key=lambda example: len(example.input_ids))
    chunks = [examples[start : start + options.batch_size] for start in range(0, len(examples), options.batch_size)]
    return [_batch(chunk, padding(adapted.tokenizer), options.torch_device) for chunk in chunks]


def _batch(chunk: list[Encoded], pad_id: int, device: torch.device) -> Batch:
    ids = [torch.tensor(example.input_ids, dtype=torch.long) for example in chunk]
    inputs = {"input_ids": _padded(ids, pad_id), "attention_mask": _padded([torch.ones_like(row) for row in ids], 0)}
    labels = [torch.tensor(example.labels) for example in chunk]
    together = torch.stack(labels) if labels[0].ndim == 0 else _padded(labels, IGNORED)
    return Batch({name: value.to(device) for name, value in inputs.items()}, together.to(device))


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text must be a string, got {value!r}")
    return value


def _class(label: object, names: dict[str, int]) -> int:
    """The number of a class, given as such or by the name that the model's configuration has for it."""
    number = names.get(label) if isinstance(label, str) else label
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise ValueError(f"label must be a number from 0 to {len(names) - 1} or one of {list(names)}, got {label!r}")
    return number
