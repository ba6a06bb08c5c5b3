"""VQAData: questions about images, split without leaks, in resumable batches."""

import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.clip.images import blind_skips
from recipes.data.parted_data import PartedData
from recipes.data.parts import is_file
from recipes.data.reading import columns, mapped
from recipes.data.resumable import LateLoader
from recipes.language.batches import Batch, loader_by_length
from recipes.vqa import sources
from recipes.vqa.conversation import QuestionEncoder, answer_labels
from recipes.vqa.images import open_images, usable
from recipes.vqa.metrics import expected_answer
from recipes.vqa.model import load_processor
from recipes.vqa.prompts import Prompt


@dataclass(eq=False)
class VQAData(PartedData):
    """Any visual question answering data set, for a generative vision-language model.

    Shares divide the training split by its images: all questions about an image stay together. Questions without an
    image are left out.

    Args:
        dataset: a Hub name, a local folder or .json, .jsonl, .parquet or .csv file, or "packaged:easy_vqa",
            "packaged:easy_vqa_plain" (without negation) or "packaged:easy_vqa_negated" (only negated). "{split}" is
            replaced by the split. Only `predict` needs none.
        image_folder: where relative image paths start, None for the file's own folder; "{split}" is replaced by the
            split. In `predict`, which has no split, a folder with "{split}" counts as None.
        columns: the data's own names of columns, each with the recipe's name, such as ``{"picture": "image",
            "caption": "answer"}``.
        type_column: column with the questions' types, for the metrics; None takes the first that exists of type,
            question_type, answer_type, category and subject.
        prompt: text put to the model, with {question} and, for questions with choices, {choices} and {hint}. None is
            only the question or, with choices, the hint, the question, the choices and how to answer.
        choice_separator: text between two choices.
        processor: name or folder of a processor; None takes the model's.
        max_length: most tokens of question and answer; longer ones are left out and counted.
        chat_template: a Jinja template or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template. If the template takes none, the question
            begins with it.
        template_arguments: variables of the chat template, such as {"enable_thinking": false}.
        max_pixels: most pixels of an image; larger ones are scaled down in their proportions. With models that keep an
            image's size, such as Qwen2-VL, it limits the tokens: one for 28 x 28 pixels. None leaves that to the
            processor.
        check_images: decode every image once before training, to find broken ones.
        skip_unreadable: leave out and count questions whose image can't be read, instead of raising an error.
        questions: a file for `predict` with ``image`` and ``question`` in each row, and optionally ``choices`` and
            ``hint``.
    """

    image_folder: str | None = None
    columns: dict[str, str] | None = None
    type_column: str | None = None
    prompt: str | None = None
    choice_separator: str = "\n"
    processor: str | None = None
    max_length: int = 512
    chat_template: str | None = None
    system_prompt: str | None = None
    template_arguments: dict[str, Any] | None = None
    max_pixels: int | None = 1280 * 28 * 28
    check_images: bool = True
    skip_unreadable: bool = False
    questions: str | None = None

    packaged: ClassVar[str] = sources.PACKAGED
    packaged_splits: ClassVar[Sequence[str]] = ("train", "test")
    kinds: ClassVar[str] = "images"
    least: ClassVar[dict[str, int]] = {"max_length": 2, "max_pixels": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prompt = Prompt(self.prompt, self.choice_separator)

    @override
    def problems(self) -> list[str]:
        return blind_skips(self.skip_unreadable, self.check_images)

    @override
    def begin(self) -> None:
        processor = self.trained_module.processor if self.processor is None else load_processor(self.processor)
        template = self.chat_template, self.system_prompt, self.template_arguments
        self.encoder = QuestionEncoder(processor, *template, self.max_pixels)

    @override
    def read(self, split: str) -> Any:
        settings = self.image_folder, self.config_name, self.revision, self.type_column, self._prompt, self.columns
        return sources.load_questions(self.source(split), split, *settings)

    @override
    def keys(self, rows: Any) -> list[str]:
        folder = sources.image_folder_of(self.source(self.split), self.split, self.image_folder)
        return [_image_key(row["image"], folder) for row in rows.select_columns("image")]

    @override
    def identities(self, rows: Any) -> list[Hashable]:
        # Many questions are asked about an image, and a repeated one is also identified by what was said before it.
        asked = rows.select_columns(["image", "question", "history"])
        return [(_image_key(row["image"], Path()), row["question"], str(row["history"])) for row in asked]

    @override
    def encoded(self, part: str, rows: Any) -> Any:
        split = self.own_splits.get(part) or self.split
        name = split if is_file(split) else f"{self.source(split)}, split {split}"
        seen = self._with_usable_images(rows, name)
        table = mapped(seen, partial(_rendered, encoder=self.encoder), desc=f"Tokenizing {part}")
        kept = table.select([i for i, length in enumerate(table["length"]) if length <= self.max_length])
        notes = [f"{name}, for {part}: {len(kept)} questions"]
        if len(seen) < len(rows):
            notes.append(f"{len(rows) - len(seen)} left out: the image can't be read")
        if len(kept) < len(table):
            notes.append(f"{len(table) - len(kept)} left out: longer than max_length={self.max_length} tokens of text")
        self.reports[part] = "; ".join(notes)
        return kept

    def _with_usable_images(self, table: Any, name: str) -> Any:
        return table.select(usable(table, name, self.skip_unreadable)) if self.check_images else table

    @override
    def loader(self, part: str) -> LateLoader:
        is_training = part == "train"
        collate = partial(collated, encoder=self.encoder, with_prompts=not is_training)
        return loader_by_length(self, self.parts[part], collate, is_training)

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        if self.questions is None:
            raise MisconfigurationException(
                "predict needs --data.questions FILE, with image and question in each row, such as a .jsonl file"
            )
        # A prediction has no split, so a folder of splits does not apply.
        asked_in = self.questions, self.questions, self.image_folder
        table = sources.load_questions(*asked_in, prompt=self._prompt, answered=False)
        folder = sources.image_folder_of(*asked_in)
        rows = []
        for index, row in enumerate(self._with_usable_images(table, self.questions)):
            prompt = self.encoder.prompt(row["question"])
            rows.append({**row, "indices": index, "prompt": prompt, "name": _image_key(row["image"], folder)})
        return rows

    @override
    def batch_to_predict(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        table = columns(rows, ("indices", "name", "question", "image", "prompt"))
        images = open_images(table.pop("image"), table["question"])
        return {**table, "prompts": self.encoder(table["prompt"], images, padding_side="left")}


def collated(rows: dict[str, list[Any]], encoder: QuestionEncoder, with_prompts: bool) -> Batch:
    """Return rows of the encoded data as one batch.

    It holds ``inputs`` (of the model, padded on the right) and ``labels`` (rows, T), the annotators' ``answers``, the
    questions' ``types`` and ``choices``, and in evaluation ``prompts``: inputs without the answers, padded on the left.

    Args:
        rows: rows given in columns.
        encoder: the model's encoder.
        with_prompts: add the prompts, for evaluation.
    """
    images = open_images(rows["image"], rows["question"])
    inputs = encoder(rows["text"], images, padding_side="right")
    batch = {"inputs": inputs, "labels": answer_labels(inputs, rows["learnt"])}
    batch |= {"answers": rows["answers"], "types": rows["type"], "choices": rows["choices"]}
    if with_prompts:
        batch["prompts"] = encoder(rows["prompt"], images, padding_side="left")
    return batch


def _rendered(row: dict[str, Any], encoder: QuestionEncoder) -> dict[str, Any]:
    """Return a row's columns of :class:`recipes.vqa.conversation.Rendered`."""
    return encoder.render(row["question"], expected_answer(row["answers"]), row["history"])._asdict()


def _image_key(image: dict[str, Any], folder: Path) -> str:
    """Return the key that decides an image's part: its content if it is in the data set, else its path in the folder.

    A file's name would not do, since it may be rgb.png in every folder.
    """
    if image["bytes"]:
        return hashlib.sha256(image["bytes"]).hexdigest()
    return Path(os.path.relpath(image["path"], folder)).as_posix()
