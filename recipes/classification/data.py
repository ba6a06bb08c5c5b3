"""TextData: texts with a class or a number, from files, the Hub or packages, in batches that a resumed run takes up."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from recipes.classification.labels import class_labels, class_names, draw_shots, labelled, numbers
from recipes.classification.prompts import Prompt
from recipes.language import texts
from recipes.language.batches import loader_by_length, pad, padded, padding_id
from recipes.language.data import read_prompts
from recipes.shared.data import (
    columns,
    is_packaged,
    mapped,
    packaged_names,
    packaged_task,
    read_table,
)
from recipes.shared.left_out import few, warn_of_left_out
from recipes.shared.parted_data import PartedData
from recipes.shared.resumable import LateLoader
from recipes.shared.text_metrics import normalized

_RESERVED = ("train", "validation", "val", "test")  # names of parts and metrics
_TEST_SEED = 42  # of the rows drawn for the test, so that all runs are tested on the same ones


@dataclass(eq=False)
class TextData(PartedData):
    """Texts with a class or a number, in parts for training, validation and test.

    Shares are of the training split's texts, without case and punctuation.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            one of recipes.language.texts.TASKS, such as "packaged:sentiment", "packaged:subject",
            "packaged:all_subjects" or "packaged:privacy".
        validation_split: for validation: another split or a file, or several; None takes ``validation_share``. Those
            after the first are logged under their names, or their files' names, which must be different.
        text: the column that the model reads, or two for pairs.
        label: the column of the classes, numbers or names, or of the numbers to predict.
        regression: ``label`` holds numbers to predict.
        skip_unlabelled: leave out rows without a label, instead of an error.
        template: of prompts, for a model that predicts label words, as :class:`recipes.classification.prompts.Prompt`
            explains; None gives the model the texts alone, for a head.
        text_tokens: with a template, tokens kept of each text; None keeps what ``max_length`` has room for.
        shots: train on so many texts of each class, and without a ``validation_split`` validate on as many others.
        shots_seed: of the draw of these texts.
        test_rows: test on so many texts at most, the same ones in all runs.
        max_length: tokens kept of a text.
        predict_file: texts without labels, for `predict`: a table with the columns of ``text``, or, where that is one
            column, a .txt file with a text in each line.

    Attributes:
        classes: names of the classes, once `setup` has run; a label is an index of this list. Empty for a regression.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, a missing column, fewer than
            two classes, an unknown class, hidden labels, or an empty part (in `setup`, before training).
    """

    validation_split: str | list[str] | None = None  # type: ignore[assignment]
    text: str | list[str] = "text"
    label: str = "label"
    regression: bool = False
    skip_unlabelled: bool = False
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
        given = self.validation_split
        self.validation_splits = [given] if isinstance(given, str) else list(given or ())
        self.text_columns = [self.text] if isinstance(self.text, str) else list(self.text)
        if self.shots is not None:
            self.validation_share = 0.0  # the texts to validate on are drawn, too
        super().__post_init__()
        self.division.is_drawn = self.shots is not None
        self.classes: list[str] = []

    @override
    def given_splits(self) -> dict[str, str | None]:
        splits: dict[str, str | None] = {"validation": None, "test": self.test_split}
        for index, split in enumerate(self.validation_splits):
            splits[Path(split).stem if index else "validation"] = split
        return splits

    @property
    def validation_parts(self) -> list[str]:
        """The parts to validate on: "validation", and after it further ones, by the names of their splits."""
        return [part for part in self.own_splits if part != "test"]

    @override
    def parts_of(self, stage: str) -> list[str]:
        parts = list(super().parts_of(stage))
        return [*parts, *self.validation_parts[1:]] if "validation" in parts else parts

    @override
    def problems(self) -> list[str]:
        problems = []
        names = [Path(split).stem for split in self.validation_splits[1:]]
        for name in names:
            if name in _RESERVED or "." in name or names.count(name) > 1:
                problems.append(
                    f"validation_split={self.validation_splits!r}: metrics of the splits after the first are logged "
                    f"under their names, and {name!r} has a dot, occurs twice, or is one of {list(_RESERVED)}: rename "
                    "the file, or put this split first"
                )
        if len(self.text_columns) > 2 and self.template is None:
            problems.append(f"text={self.text_columns} are more than two columns, which needs a template")
        if self.shots is not None and self.regression:
            problems.append("shots are of classes: leave it out in a regression")
        return problems

    @override
    def begin(self) -> None:
        self.table(self.split)  # whose classes are predicted
        self.encoder = self._encoder()

    @override
    def read(self, split: str) -> Any:
        """A split or a file, with the columns ``texts`` and ``labels``."""
        if split != self.split:
            self.table(self.split)  # first, because the classes are those of the training data
        source = self._source(split)
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
        rows = labelled(labels, self.label, source, self.skip_unlabelled)
        if len(rows) < len(labels):
            rank_zero_info(f"{source}: {len(labels) - len(rows)} of {len(labels)} rows have no label and are left out")
        rows = [row for row in rows if row in row_texts]
        found = datasets.Dataset.from_dict(
            {"texts": [row_texts[row] for row in rows], "labels": [labels[row] for row in rows]}
        )
        if split == self.split:
            if self.regression:
                _note_scale(found["labels"], source)
            else:
                _note_classes(self.classes, found["labels"], source)
        return found

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
        table = mapped(rows, self.encoder, remove_columns=["texts"], desc=f"Tokenizing {part}")
        missing = set(range(len(self.classes))) - set(rows["labels"])
        if missing and part == "validation":
            names = few([repr(self.classes[label]) for label in sorted(missing)])
            rank_zero_warn(f"{part} has no text of the classes {names}: a score over it says nothing of these")
        cut = sum(length >= self.max_length for length in table["length"])
        if cut and self.template is None:
            rank_zero_info(f"{part}: {cut} of {len(table)} texts are cut at max_length={self.max_length} tokens")
        return table

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest text; none is written."""
        return max([max(rows["length"]) for rows in self.parts.values() if len(rows)], default=0), 0

    @override
    def rows_to_predict(self) -> Any:
        row_texts = list(self._texts_to_predict().values())
        rows = datasets.Dataset.from_dict({"texts": row_texts, "places": list(range(len(row_texts)))})
        return mapped(rows, self.encoder, desc="Tokenizing predict")

    def _texts_to_predict(self) -> dict[int, list[str]]:
        """The texts of each row of ``predict_file``."""
        file, source = self.predict_file, f"predict_file={self.predict_file!r}"
        if file is None or Path(file).suffix.lower() in ("", ".txt"):
            lines = read_prompts(file, "text", "predict_file")
            table = datasets.Dataset.from_dict({self.text_columns[0]: lines})
        else:
            table = read_table(file, file)
        self._check_columns(table, self.text_columns, source)
        return self._texts(table, source)

    def _texts(self, table: Any, source: str) -> dict[int, list[str]]:
        """The texts of each row that has any, one for each of the columns that the model reads."""
        columns = [table[name] for name in self.text_columns]
        for name, column in zip(self.text_columns, columns, strict=True):
            for row, value in enumerate(column):
                if value is not None and not isinstance(value, str):
                    raise MisconfigurationException(
                        f"{source}: the column {name!r} must hold texts, and row {row} holds {value!r}"
                    )
        row_texts = {}
        for row, values in enumerate(zip(*columns, strict=True)):
            if any(value and value.strip() for value in values):
                row_texts[row] = [value or "" for value in values]
        without = [row for row in range(len(table)) if row not in row_texts]
        warn_of_left_out(source, [f"row {row} has no text" for row in without], len(table))
        return row_texts

    def _source(self, split: str) -> str:
        return f"dataset={self.dataset!r}" if split == self.split else f"dataset={self.dataset!r}, split={split!r}"

    def _check_columns(self, table: Any, wanted: Sequence[str], source: str) -> None:
        names = table.column_names
        missing = sorted(set(wanted) - set(names))
        if missing:
            raise MisconfigurationException(
                f"{source} has the columns {sorted(names)}, and not {missing}: name those that it has, for example "
                f"--data.text {names[0]} --data.label {names[-1]}"
            )

    def _table(self, split: str) -> Any:
        name = self.source(split)
        if not is_packaged(name):
            return read_table(name, split, self.packaged, self.config_name, self.revision)
        task = packaged_task(name, texts.TASKS)
        examples = list(task.read())
        names = task.classes
        return datasets.Dataset.from_dict(
            {self.text_columns[0]: [e.text for e in examples], self.label: [names[e.label] for e in examples]}
        )

    @override
    def loader(self, part: str) -> LateLoader:
        collate = partial(_collate, pad_id=padding_id(self.trained_module.tokenizer))
        return loader_by_length(self, self.parts[part], collate, part == "train")

    @override
    def val_dataloader(self) -> list[LateLoader]:
        return [self.loader(part) for part in self.validation_parts if len(self.parts[part])]

    @override
    def batch_to_predict(self, rows: Sequence[Any]) -> dict[str, Any]:
        table = columns(rows, list(rows[0]))
        batch = _collate(table, padding_id(self.trained_module.tokenizer))
        return {**batch, "texts": table["texts"], "places": table["places"]}

    def _encoder(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        tokenizer = self.trained_module.tokenizer
        if self.template is None:
            separator = ""
            is_pair = len(self.text_columns) == 2
            # Encoders have a token between two texts; the tokenizers of most decoders put them end to end.
            if is_pair and tokenizer.num_special_tokens_to_add(True) == tokenizer.num_special_tokens_to_add(False):
                separator = "\n"
                rank_zero_info("The tokenizer puts nothing between two texts: the second one begins on a new line")
            return partial(_encode, tokenizer=tokenizer, max_length=self.max_length, separator=separator)
        prompt = Prompt(self.template, self.text_columns, tokenizer, self.max_length, self.text_tokens)
        prompt.check()
        return prompt


def _note_classes(classes: Sequence[str], labels: Sequence[int], source: str) -> None:
    """Say what the classes are, and how many texts each has."""
    counts = Counter(labels)
    shown = [f"{name!r} ({counts[label]})" for label, name in enumerate(classes)]
    rank_zero_info(f"{source}: {len(classes)} classes, {few(shown, most=20)}")


def _note_scale(labels: Sequence[float], source: str) -> None:
    """Say what a regression learns, whose new head begins at 0 and moves by small steps."""
    mean, deviation = float(np.mean(labels)), float(np.std(labels))
    rank_zero_info(f"{source}: numbers with mean {mean:.4g} and standard deviation {deviation:.4g}")


def _encode(row: dict[str, Any], tokenizer: Any, max_length: int, separator: str) -> dict[str, Any]:
    first, *second = row["texts"]
    encoded = tokenizer(first, *(separator + text for text in second), truncation=True, max_length=max_length)
    columns = {"input_ids": encoded["input_ids"], "length": len(encoded["input_ids"])}
    if len(row["texts"]) == 2 and "token_type_ids" in encoded:  # BERT's, which say where the second text begins
        columns["token_type_ids"] = encoded["token_type_ids"]
    return columns


def _collate(columns: dict[str, list[Any]], pad_id: int) -> dict[str, torch.Tensor]:
    batch = padded(columns["input_ids"], pad_id)
    for name in {"labels", "position"} & columns.keys():
        batch[name] = torch.tensor(columns[name])
    if "token_type_ids" in columns:
        batch["token_type_ids"] = pad([torch.tensor(row) for row in columns["token_type_ids"]], 0)
    return batch
