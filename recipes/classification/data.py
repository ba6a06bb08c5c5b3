"""TextData: texts with a class or a number, from files, the Hub or packages, in batches that a resumed run takes up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.classification.labels import class_labels, class_names, draw_shots, labelled, numbers
from recipes.classification.prompts import Prompt
from recipes.language import texts
from recipes.language.batches import LengthBatchSampler, pad, padding_id
from recipes.language.data import read_prompts, token_keys
from recipes.shared.data import (
    columns,
    given_dataset,
    is_packaged,
    mapped,
    packaged_names,
    packaged_task,
    part_of,
    read_table,
    refuse_bad_settings,
    refuse_training_data,
    remedy_of_empty,
    shares_of,
    split_problems,
    take_own_splits,
    warn_of_training_data,
    with_known_names,
)
from recipes.shared.resumable import PARTS_OF_STAGE, LateLoader, ResumableData
from recipes.shared.table_files import FORMATS, table_ending
from recipes.shared.text_metrics import normalized

_PACKAGED = packaged_names(texts.TASKS)
_RESERVED = ("train", "validation", "val", "test")  # names of parts and metrics
_MOST_SHOWN = 20  # classes by name
_TEST_SEED = 42  # of the rows drawn for the test, so that all runs are tested on the same ones


@dataclass(eq=False)
class TextData(ResumableData):
    """Texts with a class or a number, in parts for training, validation and test.

    Validation and test are splits of their own, or shares of the training split. For the latter, a text's part is read
    off a hash of the text, so that it does not change with the order, the seed or the size of the data, and equal texts
    stay together.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or
            one of recipes.language.texts.TASKS, such as "packaged:sentiment", "packaged:spam", "packaged:subject",
            "packaged:all_subjects" or "packaged:privacy".
        config_name: which of a Hub data set's configurations, such as "mrpc" of GLUE.
        revision: of a Hub data set; "refs/convert/parquet" is there where the main one is a script.
        split: of a Hub data set, for training.
        validation_split: for validation: another split or a file, or several; None takes ``validation_share``. Those
            after the first are logged under their names, or their files' names, which must be different.
        test_split: for `test`: another split or a file that is not trained on; None takes ``test_share``.
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
        batch_size: texts of a batch.
        max_length: tokens kept of a text.
        validation_share: share of the training split's texts for validation; 0 validates on nothing. None takes the
            split "validation" that a folder or a Hub data set has, or 0.05 without one.
        test_share: share of them held out for `test`, which has to be given in training too; 0 holds out none. None
            takes the split "test", or holds out none without one.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        predict_file: texts without labels, for `predict`: a table with the columns of ``text``, or, where that is one
            column, a .txt file with a text in each line.

    Attributes:
        classes: names of the classes, once `setup` has run; a label is a place in this list. Empty for a regression.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, a missing column, fewer than
            two classes, an unknown class, hidden labels, or an empty part (in `setup`, before training).
    """

    dataset: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | list[str] | None = None
    test_split: str | None = None
    text: str | list[str] = "text"
    label: str = "label"
    regression: bool = False
    skip_unlabelled: bool = False
    template: str | None = None
    text_tokens: int | None = None
    shots: int | None = None
    shots_seed: int = 13
    test_rows: int | None = None
    batch_size: int = 16
    max_length: int = 512
    validation_share: float | None = None
    test_share: float | None = None
    seed: int = 0
    num_workers: int = 0
    predict_file: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        given = self.validation_split
        self.validation_splits = [given] if isinstance(given, str) else list(given or ())
        self.text_columns = [self.text] if isinstance(self.text, str) else list(self.text)
        if self.shots is not None:
            self.validation_share = 0.0  # the texts to validate on are drawn, too
        self.own_splits: dict[str, str | None] = {"validation": None, "test": self.test_split}
        for place, split in enumerate(self.validation_splits):
            self.own_splits[Path(split).stem if place else "validation"] = split
        self.shares = shares_of(self)
        least = {"batch_size": 1, "max_length": 1, "num_workers": 0}
        least |= {name: 1 for name in ("shots", "text_tokens", "test_rows") if getattr(self, name) is not None}
        more = self._bad_names() + split_problems(self.dataset, [*self.validation_splits, self.test_split])
        if self.shots is not None and self.regression:
            more.append("shots are of classes: leave it out in a regression")
        refuse_bad_settings(self, least, self.shares, more)
        self.classes: list[str] = []
        self.parts: dict[str, Any] = {}

    @property
    def validation_parts(self) -> list[str]:
        """The parts to validate on: "validation", and after it further ones, by the names of their splits."""
        return [part for part in self.own_splits if part != "test"]

    def _bad_names(self) -> list[str]:
        problems = []
        names = [Path(split).stem for split in self.validation_splits[1:]]
        for name in names:
            if name in _RESERVED or "." in name or names.count(name) > 1:
                problems.append(
                    f"validation_split={self.validation_splits!r}: metrics of the splits after the first are logged "
                    f"under their names, and {name!r} has a dot, occurs twice, or is one of {list(_RESERVED)}: rename "
                    "the file, or put this split first"
                )
        return problems

    @override
    def prepare_data(self) -> None:
        take_own_splits(self, _PACKAGED)
        self._read(self.split)  # on one process, so that the others find it downloaded

    @override
    def setup(self, stage: str) -> None:
        if stage == "predict":
            self._set_up_prediction()
            return
        take_own_splits(self, _PACKAGED, stage)
        if stage == "fit":
            refuse_training_data(self, str(self.dataset), self.split, self.own_splits.values())
        wanted = list(PARTS_OF_STAGE.get(stage, ()))
        if "validation" in wanted:
            wanted += self.validation_parts[1:]
        wanted = [part for part in wanted if part not in self.parts]
        if not wanted:
            return
        table = self._read(self.split)
        if not self.regression:
            self.classes = class_names(table, self.label, self._source(self.split))
            shown = ", ".join(self.classes[:_MOST_SHOWN]) + (", ..." if len(self.classes) > _MOST_SHOWN else "")
            rank_zero_info(f"{self._source(self.split)}: {len(self.classes)} classes, {shown}")
        rows = self._labelled_rows(table, self.split)
        places = self._divided(rows)
        drawn = () if self.shots is None else ("validation",)
        for part in wanted:
            split = self.own_splits.get(part)
            if split is not None:
                self.parts[part] = self._limited(part, self._labelled_rows(self._read(split), split))
            else:
                self.parts[part] = self._limited(part, rows.select(places[part]))
            may_be_empty = part != "train" and split is None and not self.shares[part] and part not in drawn
            if not len(self.parts[part]) and not may_be_empty:
                remedy = remedy_of_empty(part, self.shares)
                raise MisconfigurationException(f"dataset={self.dataset!r}: no text is left for {part}{remedy}")
        encoder = self._encoder()
        for part in wanted:
            rows = self.parts[part]
            self.parts[part] = mapped(rows, encoder, remove_columns=["texts"], desc=f"Tokenizing {part}")
        if stage == "fit":
            trained = token_keys(self.parts["train"])
            for part in self.validation_parts:
                warn_of_training_data(part, token_keys(self.parts[part]), trained, "texts")

    def _set_up_prediction(self) -> None:
        if not self.regression:
            self.classes = class_names(self._read(self.split), self.label, self._source(self.split))
        row_texts = self._texts_to_predict()
        rows = datasets.Dataset.from_dict({"texts": row_texts, "places": list(range(len(row_texts)))})
        self.parts["predict"] = mapped(rows, self._encoder(), desc="Tokenizing predict")

    def _texts_to_predict(self) -> list[list[str]]:
        """The texts of each row of ``predict_file``."""
        file = self.predict_file
        if file is None or table_ending(file) is None:
            if len(self.text_columns) > 1:
                raise MisconfigurationException(
                    f"predict needs --data.predict_file FILE, a table with the columns {self.text_columns}, got "
                    f"{file!r}"
                )
            if file is not None and Path(file).suffix.lower() not in ("", ".txt"):
                raise MisconfigurationException(
                    f"predict_file={file!r} must be a .txt file with one text a line, or a table ending in "
                    f"{', '.join(FORMATS)}"
                )
            return [[text] for text in read_prompts(file, "text", "predict_file")]
        table = with_known_names(read_table(file, file), self.text_columns)
        source = f"predict_file={file!r}"
        missing = set(self.text_columns) - set(table.column_names)
        if missing or not len(table):
            raise MisconfigurationException(
                f"{source} must have rows with the columns {self.text_columns}, and has {len(table)} rows with "
                f"{sorted(table.column_names)}"
            )
        return self._texts(table, source)

    def _divided(self, rows: Any) -> dict[str, list[int]]:
        """The rows of the training split that are in each part."""
        keys = [normalized(" ".join(columns)) for columns in rows["texts"]]
        places: dict[str, list[int]] = {part: [] for part in texts.PARTS}
        for place, key in enumerate(keys):
            places[part_of(key, self.shares)].append(place)
        if self.shots is None:
            return places
        pool, labels = places["train"], rows["labels"][:]
        train, others = draw_shots(
            [keys[row] for row in pool], [labels[row] for row in pool], self.shots, self.shots_seed
        )
        places["train"] = [pool[row] for row in train]
        places["validation"] = [pool[row] for row in others]
        return places

    def _limited(self, part: str, rows: Any) -> Any:
        if part != "test" or self.test_rows is None or len(rows) <= self.test_rows:
            return rows
        return rows.select(np.random.default_rng(_TEST_SEED).permutation(len(rows))[: self.test_rows])

    def _labelled_rows(self, table: Any, split: str) -> Any:
        """A table with the columns ``texts`` and ``labels``."""
        source = self._source(split)
        row_texts = self._texts(table, source)
        labels: Sequence[Any]
        if self.regression:
            labels = numbers(table, self.label, source)
        else:
            labels = class_labels(table, self.label, self.classes, source)
        rows = labelled(labels, self.label, source, self.skip_unlabelled)
        if len(rows) < len(labels):
            rank_zero_info(f"{source}: {len(labels) - len(rows)} of {len(labels)} rows have no label and are left out")
        return datasets.Dataset.from_dict(
            {"texts": [row_texts[row] for row in rows], "labels": [labels[row] for row in rows]}
        )

    def _texts(self, table: Any, source: str) -> list[list[str]]:
        """The texts of each row, one for each of the columns that the model reads."""
        columns = [table[name] for name in self.text_columns]
        for name, column in zip(self.text_columns, columns, strict=True):
            for row, value in enumerate(column):
                if not isinstance(value, str):
                    raise MisconfigurationException(
                        f"{source}: the column {name!r} must hold texts, and row {row} holds {value!r}"
                    )
        return [list(row) for row in zip(*columns, strict=True)]

    def _source(self, split: str) -> str:
        return f"dataset={self.dataset!r}" if split == self.split else f"dataset={self.dataset!r}, split={split!r}"

    def _read(self, split: str) -> Any:
        """A split or a file, which has the columns."""
        wanted = {*self.text_columns, self.label}
        table = with_known_names(self._table(split), wanted)
        missing = wanted - set(table.column_names)
        if missing:
            raise MisconfigurationException(
                f"{self._source(split)} has the columns {sorted(table.column_names)}, and not {sorted(missing)}: "
                "set text and label"
            )
        return table

    def _table(self, split: str) -> Any:
        if table_ending(split) is not None:
            return read_table(split, split, _PACKAGED)
        name = given_dataset(self.dataset, _PACKAGED)
        if not is_packaged(name):
            return read_table(name, split, _PACKAGED, self.config_name, self.revision)
        task = packaged_task(name, texts.TASKS)
        if split != self.split:
            raise MisconfigurationException(
                f"dataset={self.dataset!r}, split={split!r}: packaged texts have no other splits"
            )
        examples = list(task.read())
        names = task.classes
        return datasets.Dataset.from_dict(
            {self.text_columns[0]: [e.text for e in examples], self.label: [names[e.label] for e in examples]}
        )

    @override
    def loader(self, part: str) -> LateLoader:
        rows = self.parts[part]
        is_train = part == "train"
        sampler = LengthBatchSampler(rows["length"], self.batch_size, self.seed, shuffle=is_train, **self.ranks())
        return self.whole_batches(rows, sampler, partial(_collate, pad_id=padding_id(self._tokenizer())))

    @override
    def val_dataloader(self) -> list[LateLoader]:
        return [self.loader(part) for part in self.validation_parts if len(self.parts[part])]

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self.prompts_loader(partial(_collate_rows, pad_id=padding_id(self._tokenizer())))

    def _encoder(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        if self.template is None:
            return partial(_encode, tokenizer=self._tokenizer(), max_length=self.max_length)
        prompt = Prompt(self.template, self.text_columns, self._tokenizer(), self.max_length, self.text_tokens)
        prompt.check()
        return prompt

    def _tokenizer(self) -> Any:
        return cast("L.Trainer", self.trainer).lightning_module.tokenizer


def _encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    encoded = tokenizer(*row["texts"], truncation=True, max_length=max_length)
    if not encoded["input_ids"]:
        raise MisconfigurationException(
            f"the tokenizer makes no token of the text {' '.join(row['texts'])!r}, so there is nothing to classify: "
            "leave such rows out"
        )
    columns = {"input_ids": encoded["input_ids"], "length": len(encoded["input_ids"])}
    if len(row["texts"]) == 2 and "token_type_ids" in encoded:  # BERT's, which say where the second text begins
        columns["token_type_ids"] = encoded["token_type_ids"]
    return columns


def _collate_rows(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    table = columns(rows, list(rows[0]))
    return {**_collate(table, pad_id), "texts": table["texts"], "places": table["places"]}


def _collate(columns: dict[str, list[Any]], pad_id: int) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row in columns["input_ids"]]
    batch: dict[str, torch.Tensor] = {
        name: torch.tensor(columns[name]) for name in ("labels", "position") if name in columns
    }
    batch["input_ids"] = pad(ids, pad_id)
    batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], 0)
    if "token_type_ids" in columns:
        batch["token_type_ids"] = pad([torch.tensor(row) for row in columns["token_type_ids"]], 0)
    return batch
