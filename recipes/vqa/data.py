"""VQAData: questions about images, split without leaks, in batches that a resumed run continues."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from recipes.clip.images import blind_skips
from recipes.language.batches import Batch, LengthBatchSampler
from recipes.shared.data import (
    columns,
    given_dataset,
    mapped,
    part_of,
    refuse_bad_settings,
    refuse_training_data,
    remedy_of_empty,
    shares_of,
    split_problems,
    take_own_splits,
    warn_of_training_data,
)
from recipes.shared.resumable import PARTS_OF_STAGE, LateLoader, ResumableData
from recipes.vqa import easy_vqa, sources
from recipes.vqa.conversation import QuestionEncoder, Rendered, answer_labels
from recipes.vqa.images import open_images, usable
from recipes.vqa.metrics import expected_answer
from recipes.vqa.model import load_processor
from recipes.vqa.prompts import Prompt


@dataclass(eq=False)
class VQAData(ResumableData):
    """Any visual question answering data set, for a generative vision-language model.

    Validation and test are splits of the data set, or shares of its images, read off a hash of the image: a share does
    not change with the order, the seed or the size of the data, and all questions about an image stay together.

    Args:
        dataset: a Hub name, a local folder or .json, .jsonl, .parquet or .csv file, or "packaged:easy_vqa",
            "packaged:easy_vqa_plain" (without negation) or "packaged:easy_vqa_negated" (those with it). "{split}"
            stands for the split. Only `predict` needs none.
        split: for training.
        validation_split: for validation, or a file of its own; None takes ``validation_share``.
        test_split: for testing, or a file of its own; None takes ``test_share``.
        config_name: which of a Hub data set's configurations; None where it has one.
        revision: of a Hub data set.
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
        batch_size: questions of a batch.
        max_length: tokens of question and answer; longer ones are left out, and counted.
        chat_template: a Jinja template or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template. Where the template takes none, it stands at
            the head of the question.
        template_arguments: variables of the chat template, such as {"enable_thinking": false}.
        max_pixels: largest number of pixels of an image; larger ones are scaled down, in their proportions. With
            models that keep an image's size, such as Qwen2-VL, it bounds the tokens: 28 x 28 pixels are one. None
            leaves that to the processor.
        min_pixels: smallest number of pixels of an image; smaller ones are scaled up.
        validation_share: share of the training split's images for validation; None takes the split that the data set
            has for it, or 0.05 without one.
        test_share: share of them held out for `test`, which has to be given in training too; None takes the split that
            the data set has for it, or holds out none without one.
        check_images: decode every image once before training, to find broken ones.
        skip_unreadable: leave out, and count, questions with an image that can't be read, instead of an error.
        text_only: also take questions without an image; False leaves them out, and counts them.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        questions: a file with ``image`` and ``question`` in each row, perhaps ``choices`` and ``hint``, for `predict`.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, or nothing left of it (in
            `setup`, before training).
    """

    dataset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    config_name: str | None = None
    revision: str | None = None
    image_folder: str | None = None
    columns: dict[str, str] | None = None
    type_column: str | None = None
    prompt: str | None = None
    choice_separator: str = "\n"
    processor: str | None = None
    batch_size: int = 16
    max_length: int = 512
    chat_template: str | None = None
    system_prompt: str | None = None
    template_arguments: dict[str, Any] | None = None
    max_pixels: int | None = 1280 * 28 * 28
    min_pixels: int | None = None
    validation_share: float | None = None
    test_share: float | None = None
    check_images: bool = True
    skip_unreadable: bool = False
    text_only: bool = True
    seed: int = 0
    num_workers: int = 0
    questions: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.own_splits = {"validation": self.validation_split, "test": self.test_split}
        self.shares = shares_of(self)
        self._prompt = Prompt(self.prompt, self.choice_separator)
        problems = blind_skips(self.skip_unreadable, self.check_images)
        problems += _pixel_problems(self.max_pixels, self.min_pixels)
        refuse_bad_settings(self, {"batch_size": 1, "max_length": 2, "num_workers": 0}, self.shares, problems)
        self.parts = {}
        self.reports: dict[str, str] = {}

    @override
    def prepare_data(self) -> None:
        # A prediction reads the user's own file alone.
        if self.trainer is None or self.trainer.state.fn != TrainerFn.PREDICTING:
            easy_vqa.fetch(given_dataset(self.dataset, sources.PACKAGED))

    @override
    def setup(self, stage: str) -> None:
        # Not where the arguments are checked: the base's test split is no mistake in `predict`, which reads no part.
        if stage != "predict":
            take_own_splits(self, sources.PACKAGED, stage)
            refuse_bad_settings(self, {}, more=split_problems(self.dataset, self.own_splits.values()))
        if stage == "fit":
            refuse_training_data(self, str(self.dataset), self.split, self.own_splits.values())
        self.encoder = QuestionEncoder(
            self._processor(),
            self.chat_template,
            self.system_prompt,
            self.template_arguments,
            self.max_pixels,
            self.min_pixels,
        )
        if stage == "predict":
            self.parts["predict"] = self._read_questions()
            return
        for part in PARTS_OF_STAGE[stage]:
            if part not in self.parts:
                self.parts[part] = self._encoded(part)
        if stage == "fit" and self.own_splits["validation"] is not None:
            trained = _question_keys(self.parts["train"])
            held_out = _question_keys(self.parts["validation"])
            warn_of_training_data("validation", held_out, trained, "questions about the same image")
        if stage == "validate" and not len(self.parts["validation"]):
            raise MisconfigurationException(
                "there is nothing to validate on: give --data.validation_split, or train with "
                "--data.validation_share 0.05, say"
            )

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.prompts_loader(partial(_prompts, encoder=self.encoder))

    @override
    def loader(self, part: str) -> LateLoader:
        rows, training = self.parts[part], part == "train"
        sampler = LengthBatchSampler(rows["length"], self.batch_size, seed=self.seed, shuffle=training, **self.ranks())
        return self.whole_batches(rows, sampler, Collate(self.encoder, with_prompts=not training))

    def _processor(self) -> Any:
        if self.processor is not None:
            return load_processor(self.processor)
        if self.trainer is None:
            raise MisconfigurationException("processor=None takes the module's: set it, or use a Trainer")
        return self.trainer.lightning_module.processor

    # -- which questions

    def _chosen(self, part: str) -> Any:
        """A part's questions: a split of the data set, or a share of the training split's images."""
        own = self.own_splits.get(part)
        if part != "train" and own is None and not self.shares[part]:
            return []
        settings = self.image_folder, self.config_name, self.revision, self.type_column, self._prompt, self.columns
        table = sources.load(str(self.dataset), own or self.split, *settings)
        if own is not None or not any(self.shares.values()):
            return table
        folder = sources.image_folder_of(str(self.dataset), self.split, self.image_folder)
        keys = (_image_key(row, folder) for row in table.select_columns(["image", "question"]))
        return table.select([i for i, key in enumerate(keys) if part_of(key, self.shares) == part])

    def _encoded(self, part: str) -> Any:
        """One part with the texts that are to be tokenized, without the rows that can't teach or test anything."""
        table = self._chosen(part)
        name = f"{self.dataset}, split {self.own_splits.get(part) or self.split}"
        counts = Counter(asked=len(table))
        if len(table):
            table = self._with_usable_images(table, name, counts)
        if len(table):
            table = mapped(table, partial(_rendered, encoder=self.encoder, known={}), desc=f"Tokenizing {part}")
            kept = table.select([i for i, length in enumerate(table["length"]) if length <= self.max_length])
            counts["too long"], table = len(table) - len(kept), kept
        self.reports[part] = self._report(f"{name}, for {part}", len(table), counts)
        rank_zero_info(self.reports[part])
        remedy = "" if counts["asked"] else remedy_of_empty(part, self.shares)
        if not len(table) and (part == "train" or counts["asked"] or remedy):
            raise MisconfigurationException(f"nothing is left to use. {self.reports[part]}{remedy}")
        return table

    def _with_usable_images(self, table: Any, name: str, counts: Counter[str]) -> Any:
        """The rows whose image can be read, and those without one if they are wanted; the others are counted."""
        seeing = [place for place, has_image in enumerate(table["has_image"]) if has_image]
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

    def _read_questions(self) -> list[dict[str, Any]]:
        if self.questions is None:
            raise MisconfigurationException(
                "predict needs --data.questions FILE, with image and question in each row, such as a .jsonl file"
            )
        # A prediction has no split, so that a folder of splits is none for it.
        own_folder = self.image_folder is None or "{split}" in self.image_folder
        image_folder = None if own_folder else self.image_folder
        table = sources.load(self.questions, "train", image_folder, prompt=self._prompt, answered=False)
        table = self._with_usable_images(table, self.questions, Counter())
        folder = sources.image_folder_of(self.questions, "train", image_folder)
        asked = []
        for line, row in enumerate(table):
            prompt = self.encoder.prompt(row["question"], has_image=row["has_image"])
            asked.append({**row, "line": line, "prompt": prompt, "name": _name_of(row["image"], folder)})
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
        labels = answer_labels(inputs, rows["spans"])
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


def _prompts(rows: list[dict[str, Any]], encoder: QuestionEncoder) -> Batch:
    table = columns(rows, ("line", "name", "question", "image", "prompt"))
    images = open_images(table.pop("image"), table["question"])
    return {**table, "prompts": encoder(table["prompt"], images, padding_side="left")}


def _name_of(image: dict[str, Any] | None, folder: Path) -> str:
    """An image's file as a list of questions names it; "" where it has none."""
    is_file = image is not None and not image["bytes"]
    return os.path.relpath(image["path"], folder) if image is not None and is_file else ""


def _image_key(row: dict[str, Any], folder: Path) -> str:
    """What decides on an image's part: its content if it is inside the data set, else its file's place in the folder.

    Not the name alone, which may be rgb.png in every folder. Without an image it is the question.
    """
    image = row["image"]
    if image is None:
        return str(row["question"])
    if image["bytes"]:
        return hashlib.sha256(image["bytes"]).hexdigest()
    return Path(os.path.relpath(image["path"], folder)).as_posix()


def _question_keys(rows: Any) -> list[int]:
    """A key of each row's image, question and conversation before it."""
    keys = []
    for row in rows.select_columns(["image", "question", "history"]):
        image = row["image"] or {}
        shown = image.get("bytes") or os.path.abspath(image.get("path") or "")
        keys.append(hash((shown, row["question"], str(row["history"]))))
    return keys


def _pixel_problems(max_pixels: int | None, min_pixels: int | None) -> list[str]:
    problems = []
    for name, value in (("max_pixels", max_pixels), ("min_pixels", min_pixels)):
        if value is not None and value < 1:
            problems.append(f"{name} must be an integer >= 1 or null, got {value!r}")
    if not problems and max_pixels is not None and min_pixels is not None and min_pixels > max_pixels:
        problems.append(f"min_pixels must not exceed max_pixels, got {min_pixels!r} and {max_pixels!r}")
    return problems
