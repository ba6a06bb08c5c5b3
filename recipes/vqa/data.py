"""VQAData: questions about images, split without leaks, in batches that a resumed run continues."""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.clip.images import blind_skips
from recipes.language.batches import Batch, loader_by_length
from recipes.shared.data import columns, mapped
from recipes.shared.parted_data import PartedData
from recipes.shared.parts import is_file
from recipes.shared.resumable import LateLoader
from recipes.vqa import sources
from recipes.vqa.conversation import QuestionEncoder, Rendered, answer_labels
from recipes.vqa.images import open_images, usable
from recipes.vqa.metrics import expected_answer
from recipes.vqa.model import load_processor
from recipes.vqa.prompts import Prompt


@dataclass(eq=False)
class VQAData(PartedData):
    """Any visual question answering data set, for a generative vision-language model.

    Shares are of the training split's images: all questions about an image stay together.

    Args:
        dataset: a Hub name, a local folder or .json, .jsonl, .parquet or .csv file, or "packaged:easy_vqa",
            "packaged:easy_vqa_plain" (without negation) or "packaged:easy_vqa_negated" (those with it). "{split}"
            stands for the split. Only `predict` needs none.
        image_folder: where relative image paths start, None for the file's own folder; "{split}" stands for the split.
            In `predict`, which has no split, a folder of splits counts as None.
        columns: the data's own names of columns, each with the name by which this recipe knows it, such as
            ``{"picture": "image", "caption": "answer"}``.
        type_column: the column with the questions' types, for the metrics; None takes the first that is there of
            type, question_type, answer_type, category and subject.
        prompt: what the model is asked: a text with {question}, and for questions with choices {choices} and {hint}.
            None is the question alone, or the hint, the question, the choices and what to answer with.
        choice_separator: stands between two choices.
        processor: name or folder of a processor; None takes the module's.
        max_length: tokens of question and answer; longer ones are left out, and counted.
        chat_template: a Jinja template or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template. Where the template takes none, it stands at
            the head of the question.
        template_arguments: variables of the chat template, such as {"enable_thinking": false}.
        max_pixels: largest number of pixels of an image; larger ones are scaled down, in their proportions. With
            models that keep an image's size, such as Qwen2-VL, it bounds the tokens: 28 x 28 pixels are one. None
            leaves that to the processor.
        min_pixels: smallest number of pixels of an image; smaller ones are scaled up.
        check_images: decode every image once before training, to find broken ones.
        skip_unreadable: leave out, and count, questions with an image that can't be read, instead of an error.
        text_only: also take questions without an image; False leaves them out, and counts them.
        questions: a file with ``image`` and ``question`` in each row, perhaps ``choices`` and ``hint``, for `predict`.
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
    min_pixels: int | None = None
    check_images: bool = True
    skip_unreadable: bool = False
    text_only: bool = True
    questions: str | None = None

    packaged: ClassVar[str] = sources.PACKAGED
    packaged_splits: ClassVar[Sequence[str]] = ("train", "test")
    kinds: ClassVar[str] = "images"
    least: ClassVar[dict[str, int]] = {"max_length": 2, "max_pixels": 1, "min_pixels": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prompt = Prompt(self.prompt, self.choice_separator)

    @override
    def problems(self) -> list[str]:
        problems = blind_skips(self.skip_unreadable, self.check_images)
        if self.max_pixels is not None and self.min_pixels is not None and self.min_pixels > self.max_pixels:
            problems.append(f"min_pixels={self.min_pixels} must not exceed max_pixels={self.max_pixels}")
        return problems

    @override
    def begin(self) -> None:
        self.encoder = QuestionEncoder(
            self._processor(),
            self.chat_template,
            self.system_prompt,
            self.template_arguments,
            self.max_pixels,
            self.min_pixels,
        )

    @override
    def read(self, split: str) -> Any:
        settings = self.image_folder, self.config_name, self.revision, self.type_column, self._prompt, self.columns
        return sources.load_questions(self.source(split), split, *settings)

    @override
    def keys(self, rows: Any) -> list[str]:
        folder = sources.image_folder_of(self.source(self.split), self.split, self.image_folder)
        return [_image_key(row, folder) for row in rows.select_columns(["image", "question"])]

    @override
    def identities(self, rows: Any) -> list[Hashable]:
        # Many questions are asked about an image, and a repeated one is known by what was said before it, too.
        keys: list[Hashable] = []
        for row in rows.select_columns(["image", "question", "history"]):
            if self.text_only or row["image"] is not None:
                keys.append((_image_key(row, Path()), row["question"], str(row["history"])))
        return keys

    @override
    def encoded(self, part: str, rows: Any) -> Any:
        split = self.own_splits.get(part) or self.split
        name = split if is_file(split) else f"{self.source(split)}, split {split}"
        counts: Counter[str] = Counter()
        table = self._with_usable_images(rows, name, counts)
        if len(table):
            table = mapped(table, partial(_rendered, encoder=self.encoder, known={}), desc=f"Tokenizing {part}")
            kept = table.select([i for i, length in enumerate(table["length"]) if length <= self.max_length])
            counts["too long"], table = len(table) - len(kept), kept
        self.reports[part] = self._report(f"{name}, for {part}", len(table), counts)
        return table

    @override
    def batch_to_predict(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        table = columns(rows, ("places", "name", "question", "image", "prompt"))
        images = open_images(table.pop("image"), table["question"])
        return {**table, "prompts": self.encoder(table["prompt"], images, padding_side="left")}

    @override
    def loader(self, part: str) -> LateLoader:
        is_training = part == "train"
        return loader_by_length(self, self.parts[part], Collate(self.encoder, not is_training), is_training)

    def _processor(self) -> Any:
        if self.processor is not None:
            return load_processor(self.processor)
        return self.trained_module.processor

    def _with_usable_images(self, table: Any, name: str, counts: Counter[str]) -> Any:
        """The rows whose image can be read, and those without one if they are wanted; the others are counted."""
        seeing = [index for index, has_image in enumerate(table["has_image"]) if has_image]
        counts["text alone"] = len(table) - len(seeing)
        if not self.text_only:
            table = table.select(seeing)
        elif counts["text alone"] and self._is_sharded():
            raise MisconfigurationException(
                f"{name}: {counts['text alone']} questions have no image, and under FSDP all devices must enter the "
                "image tower in each step: set text_only to false to leave them out, or use ddp"
            )
        if self.check_images:
            kept = table.select(usable(table, name, self.skip_unreadable))
            counts["unreadable"], table = len(table) - len(kept), kept
        return table

    def _is_sharded(self) -> bool:
        return self.trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)

    def _report(self, name: str, left: int, counts: Counter[str]) -> str:
        notes = {
            "text alone": f"{counts['text alone']} without an image" + (" left out" if not self.text_only else ""),
            "unreadable": f"{counts['unreadable']} left out: the image can't be read",
            "too long": f"{counts['too long']} left out: longer than max_length={self.max_length} tokens of text",
        }
        return "; ".join([f"{name}: {left} questions", *(note for what, note in notes.items() if counts[what])])

    @override
    def rows_to_predict(self) -> list[dict[str, Any]]:
        if self.questions is None:
            raise MisconfigurationException(
                "predict needs --data.questions FILE, with image and question in each row, such as a .jsonl file"
            )
        # A prediction has no split, so that a folder of splits is none for it.
        asked_in = self.questions, self.questions, self.image_folder
        table = sources.load_questions(*asked_in, prompt=self._prompt, answered=False)
        table = self._with_usable_images(table, self.questions, Counter())
        folder = sources.image_folder_of(*asked_in)
        asked = []
        for index, row in enumerate(table):
            prompt = self.encoder.prompt(row["question"], has_image=row["has_image"])
            asked.append({**row, "places": index, "prompt": prompt, "name": _name_of(row["image"], folder)})
        return asked


class Collate:
    """Rows of the encoded data as one batch.

    It holds ``inputs`` (of the model, padded on the right) and ``labels`` (rows, T), the annotators' ``answers``, the
    questions' ``types`` and ``choices``, and in evaluation ``prompts``: inputs without the answers, padded on the left.

    Args:
        encoder: of the model.
        with_prompts: for evaluation.
    """

    def __init__(self, encoder: QuestionEncoder, with_prompts: bool) -> None:
        self.encoder, self.with_prompts = encoder, with_prompts

    def __call__(self, rows: dict[str, list[Any]]) -> Batch:
        """The batch of rows that are given in columns."""
        images = open_images(rows["image"], rows["question"])
        inputs = self.encoder(rows["text"], images, padding_side="right")
        labels = answer_labels(inputs, rows["learnt"])
        batch = {"inputs": inputs, "labels": labels, "answers": rows["answers"], "types": rows["type"]}
        batch["choices"] = rows["choices"]
        return batch | (
            {"prompts": self.encoder(rows["prompt"], images, padding_side="left")} if self.with_prompts else {}
        )


def _rendered(row: dict[str, Any], encoder: QuestionEncoder, known: dict[Any, Rendered]) -> dict[str, Any]:
    """A row's columns of :class:`Rendered`; many data sets ask a question of thousands of images."""
    question, answer, has_image = row["question"], expected_answer(row["answers"]), row["has_image"]
    # A conversation hardly ever comes twice, and would only fill the memory.
    if row["history"]:
        return encoder.render(question, answer, row["history"], has_image)._asdict()
    asked = question, answer, has_image
    if asked not in known:
        known[asked] = encoder.render(question, answer, has_image=has_image)
    return known[asked]._asdict()


def _name_of(image: dict[str, Any] | None, folder: Path) -> str:
    """An image's file as a list of questions names it; "" where it has none."""
    is_file = image is not None and not image["bytes"]
    return os.path.relpath(image["path"], folder) if image is not None and is_file else ""


def _image_key(row: dict[str, Any], folder: Path) -> str:
    """What decides on an image's part: its content if it is inside the data set, else its file's path in the folder.

    Not the name alone, which may be rgb.png in every folder. Without an image it is the question.
    """
    image = row["image"]
    if image is None:
        return str(row["question"])
    if image["bytes"]:
        return hashlib.sha256(image["bytes"]).hexdigest()
    return Path(os.path.relpath(image["path"], folder)).as_posix()
