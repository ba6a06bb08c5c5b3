"""Examples of a file as batches of fixed tokens, and a model's mean loss on them."""

import glob
import inspect
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor

from lightning_flatlora.flatness import MeanLoss
from lightning_flatlora.report.adapters import Adapted, first_line, padding
from lightning_flatlora.report.conversation import answer_spans
from lightning_flatlora.report.options import Options, ReportError

# The label that PyTorch's cross-entropy leaves out.
IGNORED = -100
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
        """How many terms the loss has: tokens that count and have one before them, or one for the class of a text."""
        if isinstance(self.labels, int):
            return min(1, len(self.input_ids))  # some tokenizers make no token of an empty text
        return sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """The inputs, (rows, T), and what the model must predict: classes (rows,), or tokens (rows, T), -100 left out."""

    inputs: dict[str, Tensor]
    labels: Tensor


def read_rows(options: Options) -> list[Row]:
    """Examples of ``--data``, drawn with the seed.

    Raises:
        ReportError: the file can't be read.
    """
    path: Path = options.data
    if path.suffix.lower() not in _FORMATS:
        raise ReportError(f"--data {path}: its name must end in {', '.join(_FORMATS)}")
    try:
        rows = _drawn(path, options.examples, options.seed)
    except Exception as error:  # the readers of the four formats raise errors of many types
        if is_of_empty_file(error):
            raise ReportError(f"--data {path} is empty") from error
        raise ReportError(f"--data {path} can't be read ({first_line(error.__cause__ or error)})") from error
    if not rows:
        raise ReportError(f"--data {path} is empty")
    return rows


def _drawn(path: Path, number: int, seed: int) -> list[Row]:
    """Some rows of a file in random order, through a cache that exists only during the call, without progress bars."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, ExitStack() as stack:
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        kind = _FORMATS[path.suffix.lower()]
        files = glob.escape(str(path))  # brackets and stars in a file's name are no pattern
        options = csv_options(files, cache) if kind == "csv" else {}
        table = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache, **options)
        rows: list[Row] = table.shuffle(seed=seed).select(range(min(number, len(table)))).to_list()
        return rows


def is_of_empty_file(error: Exception) -> bool:
    """Whether an error of ``datasets.load_dataset`` says that a file has no row.

    Example:
        >>> is_of_empty_file(StopIteration()), is_of_empty_file(ValueError("a column is missing"))
        (True, False)
    """
    # Of a JSON file without a byte, of a CSV file with a header alone, and of a Parquet file without a row.
    text = f"{error} {error.__cause__}"
    return isinstance(error, StopIteration) or "corresponds to no data" in text or "BatchSize must be" in text


def csv_options(files: str | list[str], cache_dir: str | None = None) -> dict[str, Any]:
    """Options of ``datasets.load_dataset`` by which a CSV file's values stay the texts that they are.

    pandas, which reads the file, would make 3.5 of the answer "3.50" and 7 of the class "007". It would judge a column
    by its first 10,000 rows, and take the words None, NA, null and nan for nothing.

    Args:
        files: the file, or several of the same columns, as ``data_files`` takes them.
        cache_dir: of `datasets`; None is its own.

    Raises:
        ValueError: the first row has more values than the header has names, or semicolons or tabs separate the columns.
    """
    first_row = datasets.load_dataset("csv", data_files=files, split="train", cache_dir=cache_dir, nrows=1)
    names = first_row.column_names
    named = [name for name in names if name != "__index_level_0__"]
    if len(named) == 1 and ";" in named[0]:
        raise ValueError("its columns are separated by semicolons: save it with commas")
    if len(named) == 1 and "\t" in named[0]:
        raise ValueError("its columns are separated by tabs: save it with commas")
    if len(named) < len(names):  # pandas has taken the first value for the row's name
        raise ValueError(
            "the first row has more values than the header has names, and a text with a comma in it needs quotation "
            "marks around it"
        )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


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
        The loss, which the split into batches changes by rounding alone, and the number of terms of its mean.

    Raises:
        ReportError: a row that can't be encoded, or no token that counts.
    """
    columns = columns_for(adapted.task, rows)
    _check_classes(adapted)
    if "messages" in columns and not adapted.tokenizer.chat_template:
        raise ReportError(f"--data has messages, but the tokenizer of {adapted.base} has no chat template")
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(_encoded(adapted, columns, row, options.max_length))
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise ReportError(f"--data: example {number} of those drawn: {first_line(error)}") from error
    # A prompt that fills the whole length leaves nothing to predict.
    examples = [example for example in examples if example.terms]
    if not examples:
        raise ReportError(
            f"--data: no token counts within --max_length {options.max_length}: take a larger one, if the examples "
            "have an answer at all (a completion, or a message of the assistant)"
        )
    batches = _batches(examples, adapted, options)
    total = sum(example.terms for example in examples)
    # MeanLoss divides by the number of batches, while the mean over all terms is wanted.
    weight = len(batches) / total
    return MeanLoss([partial(_weighted_loss, adapted.model, batch, weight) for batch in batches]), total


def _check_classes(adapted: Adapted) -> None:
    """Refuse what has no classes of which each text is in one, since its loss is another."""
    config = adapted.model.config
    is_regression = config.num_labels == 1 or config.problem_type == "regression"
    if adapted.task == "SEQ_CLS" and (is_regression or config.problem_type == "multi_label_classification"):
        what = "predicts numbers" if is_regression else "gives a text several classes at once"
        raise ReportError(
            f"the adapter of {adapted.base} {what}: the report measures the cross-entropy of one class alone"
        )


def _weighted_loss(model: PeftModel, batch: Batch, weight: float) -> Tensor:
    """The sum of a batch's cross-entropy times a weight, in nats, float32 or wider."""
    if batch.labels.ndim == 1:
        logits, labels = model(**batch.inputs).logits, batch.labels
    else:
        logits, labels = _next_tokens(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") * weight


def _next_tokens(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (K, V) and tokens (K,), only where some row counts: most of a prompt never reaches the large head."""
    # Each token is predicted at the one before it.
    labels = batch.labels[:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**batch.inputs, use_cache=False).logits[:, columns]
    return logits.flatten(0, 1), labels[:, columns].flatten()


def _encoded(adapted: Adapted, columns: tuple[str, ...], row: Row, max_length: int) -> Encoded:
    """A row's tokens with its class, or with labels for those tokens that lie in what is to be learnt."""
    tokenizer = adapted.tokenizer
    if "messages" in columns:
        text, spans = chat(tokenizer, row["messages"])
    elif "prompt" in columns:
        prompt = _string(row["prompt"])
        text = prompt + _string(row["completion"]) + (tokenizer.eos_token or "")
        spans = [(len(prompt), len(text))]
    else:
        text = _string(row["text"])
        spans = [(0, len(text))]
    # A chat template writes the special tokens itself.
    special = "messages" not in columns
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    ids = encoded["input_ids"]
    if "label" in columns:
        return Encoded(ids, _class(row["label"], adapted.model.config.label2id))
    labels = []
    for token, place in zip(ids, encoded["offset_mapping"], strict=True):
        labels.append(token if _overlaps(place, spans) else IGNORED)
    return Encoded(ids, labels)


def chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation through the chat template, and where in it the assistant's answers lie, with their end tokens."""

    def render(some: Sequence[dict[str, str]], opened: bool) -> str:
        return str(tokenizer.apply_chat_template(list(some), tokenize=False, add_generation_prompt=opened))

    return answer_spans(render, messages, tokenizer.eos_token)


def _overlaps(place: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    """Whether a token's characters, from one place to before another, share any with one of the spans."""
    start, end = place
    return any(first < end and start < last for first, last in spans)


def _batches(examples: list[Encoded], adapted: Adapted, options: Options) -> list[Batch]:
    """Batches of similar length, padded on the right."""
    # So that little is computed for padding.
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
    number = label
    if isinstance(label, str):
        # A CSV file holds texts, also where they are numbers.
        number = int(label) if label.isdecimal() and label not in names else names.get(label)
    if isinstance(label, (bool, float)) and float(label).is_integer():  # JSON's true, and 1.0 as pandas writes it
        number = int(label)
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise ValueError(f"label must be a number from 0 to {len(names) - 1} or one of {list(names)}, got {label!r}")
    return number
