"""TextData: texts with a class or a number, from files, the Hub or packages, in resumable batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.classification.labels import class_labels, class_names, draw_shots, numbers
from recipes.classification.prompts import Prompt
from recipes.data.left_out import warn_of_left_out
from recipes.data.parted_data import PartedData
from recipes.data.reading import columns, is_packaged, mapped, packaged_names, packaged_task, read_table
from recipes.data.resumable import LateLoader
from recipes.data.text_metrics import normalized
from recipes.language.batches import loader_by_length, pad, padded, padding_id
from recipes.language.data import read_prompts
from recipes.offline import texts

_TEST_SEED = 42  # for drawing test rows, so that all runs are tested on the same ones


@dataclass(eq=False)
class TextData(PartedData):
    """Texts with a class or a number, in parts for training, validation and test.

    Shares divide the training split by its texts, ignoring case and punctuation. Rows without a text or a label are
    left out.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            one of recipes.offline.texts.TASKS, such as "packaged:sentiment", "packaged:subject",
            "packaged:all_subjects" or "packaged:privacy".
        text: the column that the model reads, or two for pairs.
        label: the column with the classes (numbers or names) or with the numbers to predict.
        regression: predict the numbers in ``label``.
        template: prompt for a model that predicts label words, see :class:`recipes.classification.prompts.Prompt`; None
            gives the model only the texts, for a head.
        text_tokens: with a template, tokens kept of each text; None keeps all that ``max_length`` allows.
        shots: train on this many texts per class and, without a ``validation_split``, validate on as many others,
            whatever ``validation_share`` is.
        shots_seed: seed for drawing these texts.
        test_rows: test on at most this many texts, the same ones in all runs.
        max_length: tokens kept of a text.
        predict_file: texts without labels, for `predict`: a table with the columns in ``text`` or, if that is a single
            column, a .txt file with one text per line.

    Attributes:
        classes: names of the classes, after `setup`; a label is an index into this list. Empty for a regression.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, a missing column, fewer than
            two classes, an unknown class, or an empty part (in `setup`, before training).
    """

    text: str | list[str] = "text"
    label: str = "label"
    regression: bool = False
    template: str | None = None
    text_tokens: int | None = None
    shots: int | None = None
    shots_seed: int = 13
    test_rows: int | None = None
    max_length: int = 512
    predict_file: str | None = None

    packaged: ClassVar[str] = packaged_names(texts.TASKS)
    deciding: ClassVar[tuple[str, ...]] = ("shares", "shots", "shots_seed")
    kinds: ClassVar[str] = "texts"
    least: ClassVar[dict[str, int]] = {"max_length": 1, "shots": 1, "text_tokens": 1, "test_rows": 1}

    def __post_init__(self) -> None:
        self.text_columns = [self.text] if isinstance(self.text, str) else list(self.text)
        if self.shots is not None:
            self.validation_share = 0.0  # the texts to validate on are drawn too
        super().__post_init__()
        self.division.is_drawn = self.shots is not None
        self.classes: list[str] = []

    @override
    def problems(self) -> list[str]:
        problems = []
        if len(self.text_columns) > 2 and self.template is None:
            problems.append(f"text={self.text_columns} names more than two columns, which needs a template")
        if self.shots is not None and self.regression:
            problems.append("shots needs classes: leave it out in a regression")
        return problems

    @override
    def begin(self) -> None:
        self.table(self.split)  # its classes are the ones to predict
        self.encoder = self._encoder()

    @override
    def read(self, split: str) -> Any:
        """Return a split or a file, with the columns ``texts`` and ``labels``."""
        if split != self.split:
            self.table(self.split)  # first, because the classes are those of the training data
        source = f"dataset={self.dataset!r}" + ("" if split == self.split else f", split={split!r}")
        table = self._table(split)
        self._check_columns(table, [*self.text_columns, self.label], source)
        row_texts = self._texts(table, source)
        labels: Sequence[Any]
        if self.regression:
            labels = numbers(table, self.label, source)
        else:
            if split == self.split:
                self.classes = class_names(table, self.label, source)
            labels = class_labels(table, self.label, self.classes, source)
        without = [f"row {row} has no label" for row, label in enumerate(labels) if label is None]
        warn_of_left_out(source, without, len(labels))
        rows = [row for row in row_texts if labels[row] is not None]
        kept = {"texts": [row_texts[row] for row in rows], "labels": [labels[row] for row in rows]}
        return datasets.Dataset.from_dict(kept)

    @override
    def keys(self, rows: Any) -> list[str]:
        return [normalized(" ".join(row_texts)) for row_texts in rows["texts"]]

    @override
    def rows(self, part: str) -> Any:
        if self.shots is None or part == "test" or self.own_splits.get(part) is not None:
            rows = super().rows(part)
            if part != "test" or self.test_rows is None or len(rows) <= self.test_rows:
                return rows
            return rows.select(np.random.default_rng(_TEST_SEED).permutation(len(rows))[: self.test_rows])
        pool = super().rows("train")
        train, others = draw_shots(self.keys(pool), pool["labels"][:], self.shots, self.shots_seed)
        if part == "validation" and not others:
            raise MisconfigurationException(
                f"shots={self.shots} takes all rows for training: give more rows, fewer shots or a validation_split"
            )
        return pool.select(train if part == "train" else others)

    @override
    def encoded(self, part: str, rows: Any) -> Any:
        return mapped(rows, self.encoder, remove_columns=["texts"], desc=f"Tokenizing {part}")

    def longest(self) -> tuple[int, int]:
        """Return the tokens of the longest text, and 0, since no answers are generated."""
        return max([max(rows["length"]) for rows in self.parts.values() if len(rows)], default=0), 0

    @override
    def rows_to_predict(self) -> Any:
        file, source = self.predict_file, f"predict_file={self.predict_file!r}"
        if file is None or Path(file).suffix.lower() in ("", ".txt"):
            lines = read_prompts(file, "text", "predict_file")
            table = datasets.Dataset.from_dict({self.text_columns[0]: lines})
        else:
            table = read_table(file, file)
        self._check_columns(table, self.text_columns, source)
        row_texts = list(self._texts(table, source).values())
        rows = datasets.Dataset.from_dict({"texts": row_texts, "indices": list(range(len(row_texts)))})
        return mapped(rows, self.encoder, desc="Tokenizing predict")

    def _texts(self, table: Any, source: str) -> dict[int, list[str]]:
        """Return the texts of each row that has any, one per column that the model reads."""
        for name in self.text_columns:
            others = [value for value in table[name] if value is not None and not isinstance(value, str)]
            if others:
                raise MisconfigurationException(f"{source}: the column {name!r} must hold texts, got {others[0]!r}")
        row_texts = {}
        for row, values in enumerate(zip(*[table[name] for name in self.text_columns], strict=True)):
            if any(value and value.strip() for value in values):
                row_texts[row] = [value or "" for value in values]
        without = [f"row {row} has no text" for row in range(len(table)) if row not in row_texts]
        warn_of_left_out(source, without, len(table))
        return row_texts

    def _check_columns(self, table: Any, wanted: Sequence[str], source: str) -> None:
        names = table.column_names
        missing = sorted(set(wanted) - set(names))
        if missing:
            raise MisconfigurationException(
                f"{source} has the columns {sorted(names)} but not {missing}: name columns that it has, for example "
                f"--data.text {names[0]} --data.label {names[-1]}"
            )

    def _table(self, split: str) -> Any:
        name = self.source(split)
        if not is_packaged(name):
            return read_table(name, split, self.packaged, self.config_name, self.revision)
        task = packaged_task(name, texts.TASKS)
        examples = list(task.read())
        labels = [task.classes[example.label] for example in examples]
        return datasets.Dataset.from_dict({self.text_columns[0]: [e.text for e in examples], self.label: labels})

    @override
    def loader(self, part: str) -> LateLoader:
        collate = partial(_collate, pad_id=padding_id(self.trained_module.tokenizer))
        return loader_by_length(self, self.parts[part], collate, part == "train")

    @override
    def batch_to_predict(self, rows: Sequence[Any]) -> dict[str, Any]:
        table = columns(rows, list(rows[0]))
        batch = _collate(table, padding_id(self.trained_module.tokenizer))
        return {**batch, "texts": table["texts"], "indices": table["indices"]}

    def _encoder(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        tokenizer = self.trained_module.tokenizer
        if self.template is not None:
            return Prompt(self.template, self.text_columns, tokenizer, self.max_length, self.text_tokens)
        # Encoders put a token between two texts; most decoders' tokenizers put nothing there.
        between = tokenizer.num_special_tokens_to_add(True) - tokenizer.num_special_tokens_to_add(False)
        return partial(_encode, tokenizer=tokenizer, max_length=self.max_length, separator="" if between else "\n")


def _encode(row: dict[str, Any], tokenizer: Any, max_length: int, separator: str) -> dict[str, Any]:
    first, *second = row["texts"]
    encoded = tokenizer(first, *(separator + text for text in second), truncation=True, max_length=max_length)
    columns = {"input_ids": encoded["input_ids"], "length": len(encoded["input_ids"])}
    if len(row["texts"]) == 2 and "token_type_ids" in encoded:  # BERT's, which mark the second text
        columns["token_type_ids"] = encoded["token_type_ids"]
    return columns


def _collate(columns: dict[str, list[Any]], pad_id: int) -> dict[str, torch.Tensor]:
    batch = padded(columns["input_ids"], pad_id)
    for name in {"labels", "position"} & columns.keys():
        batch[name] = torch.tensor(columns[name])
    if "token_type_ids" in columns:
        batch["token_type_ids"] = pad([torch.tensor(row) for row in columns["token_type_ids"]], 0)
    return batch
