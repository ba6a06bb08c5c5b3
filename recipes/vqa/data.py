"""VQAData: questions about images, split without leaks, in batches that a stopped run takes up again."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from recipes.clip.images import read_image, readable
from recipes.instruction_tuning.batches import Batch, LengthBatchSampler
from recipes.instruction_tuning.data import part_of
from recipes.resumable import LateLoader, ResumableData
from recipes.vqa import sources
from recipes.vqa.conversation import QuestionEncoder, Rendered, answer_labels
from recipes.vqa.images import open_image, usable
from recipes.vqa.metrics import expected_answer
from recipes.vqa.model import load_processor

_PARTS = ("train", "validation", "test")


class VQAData(ResumableData):
    """Any visual question answering data set, for a generative vision-language model.

    Validation and test are splits of the data set, or shares of its images, read off a hash of the image: a share does
    not change with the order, the seed or the size of the data, and all questions about an image stay together.

    Args:
        dataset: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:easy_vqa", "packaged:easy_vqa_plain"
            (without negation) or "packaged:easy_vqa_negated" (those with it). "{split}" stands for the split.
        split: for training.
        validation_split: likewise; None takes ``validation_share`` of the training split's images.
        test_split: likewise; None takes ``test_share``.
        image_folder: where relative image paths start, None for the file's own folder; "{split}" stands for the split.
        processor: name or folder of a processor; None takes the module's.
        batch_size: questions of a batch.
        max_length: tokens of question and answer; longer ones are left out, and counted.
        chat_template: a Jinja template or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template. Where the template takes none, it stands at
            the head of the question.
        template_arguments: variables of the chat template, as {"enable_thinking": false}.
        max_pixels: largest number of pixels of an image; larger ones are scaled down, in their proportions. For models
            whose images keep their size, as Qwen2-VL's, it bounds their tokens: 28 x 28 pixels are one. None leaves
            that to the processor.
        min_pixels: smallest number of pixels, likewise; smaller ones are scaled up.
        validation_share: share of the images for validation.
        test_share: share of the images held out for `test`.
        check_images: decode every image once before training, to find broken ones.
        skip_unreadable: leave out, and count, questions without an image that can be read, instead of an error.
        seed: of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.
        questions: a .jsonl file with ``image`` and ``question`` in each line, for `predict`.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, or nothing left of it (in
            `setup`, before training).
    """

    def __init__(
        self,
        dataset: str = "packaged:easy_vqa_negated",
        split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        image_folder: str | None = None,
        processor: str | None = None,
        batch_size: int = 16,
        max_length: int = 512,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        max_pixels: int | None = 1280 * 28 * 28,
        min_pixels: int | None = None,
        validation_share: float = 0.1,
        test_share: float = 0.0,
        check_images: bool = True,
        skip_unreadable: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        questions: str | None = None,
    ) -> None:
        super().__init__()
        shares = {
            "validation": 0.0 if validation_split else validation_share,
            "test": 0.0 if test_split else test_share,
        }
        _check(batch_size, max_length, num_workers, shares, skip_unreadable and not check_images)
        _check_pixels(max_pixels, min_pixels)
        self.dataset = dataset
        self.splits = {"train": split, "validation": validation_split, "test": test_split}
        self.shares = shares
        self.image_folder = image_folder
        self.processor_name = processor
        self.batch_size = batch_size
        self.max_length = max_length
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.template_arguments = template_arguments
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
        self.check_images = check_images
        self.skip_unreadable = skip_unreadable
        self.seed = seed
        self.num_workers = num_workers
        self.questions = questions
        self.parts: dict[str, Any] = {}
        self.reports: dict[str, str] = {}

    @override
    def prepare_data(self) -> None:
        sources.fetch(self.dataset)

    @override
    def setup(self, stage: str) -> None:
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
        for part in {"fit": _PARTS[:2], "validate": _PARTS[1:2], "test": _PARTS[2:]}[stage]:
            if part not in self.parts:
                self.parts[part] = self._encoded(part)
        if stage != "fit" and not len(self.parts[part]):
            raise MisconfigurationException(f"nothing to evaluate: set {part}_split, or {part}_share above 0")

    @override
    def train_dataloader(self) -> LateLoader:
        return self.gone_on(self._loader("train"))

    @override
    def val_dataloader(self) -> LateLoader | list[Any]:
        return self._loader("validation") if len(self.parts["validation"]) else []

    @override
    def test_dataloader(self) -> LateLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        rows = self.parts["predict"]
        # As many for each, which FSDP needs.
        sampler: Any = DistributedSampler(rows, shuffle=False, **self.ranks())  # type: ignore[arg-type]
        return DataLoader(
            rows, batch_size=self.batch_size, sampler=sampler, collate_fn=partial(_prompts, encoder=self.encoder)
        )

    def _loader(self, part: str) -> LateLoader:
        rows, training = self.parts[part], part == "train"
        sampler = LengthBatchSampler(rows["length"], self.batch_size, seed=self.seed, shuffle=training, **self.ranks())
        return self.whole_batches(rows, sampler, Collate(self.encoder, with_prompts=not training))

    def _processor(self) -> Any:
        if self.processor_name is not None:
            return load_processor(self.processor_name)
        if self.trainer is None:
            raise MisconfigurationException("processor=None takes the module's: set it, or use a Trainer")
        return self.trainer.lightning_module.processor

    # -- which questions

    def _chosen(self, part: str) -> Any:
        """A part's questions: a split of the data set, or a share of the training split's images."""
        own = self.splits[part]
        if own is None and not self.shares[part]:
            return []
        table = sources.load(self.dataset, own or str(self.splits["train"]), self.image_folder)
        if (own is not None and part != "train") or not any(self.shares.values()):
            return table
        keys = (_image_key(row["image"]) for row in table.select_columns("image"))
        return table.select([i for i, key in enumerate(keys) if part_of(key, self.shares) == part])

    def _encoded(self, part: str) -> Any:
        """One part with the texts that are to be tokenised, without the rows that can't teach or test anything."""
        table = self._chosen(part)
        name = f"{self.dataset}, split {self.splits[part] or self.splits['train']}"
        counts = Counter(asked=len(table))
        if self.check_images and len(table):
            table = table.select(usable(table, name, self.skip_unreadable))
            counts["without image"] = counts["asked"] - len(table)
        if len(table):
            table = table.map(partial(_rendered, encoder=self.encoder, known={}), desc=f"Tokenising {part}")
            kept = table.select([i for i, length in enumerate(table["length"]) if length <= self.max_length])
            counts["too long"], table = len(table) - len(kept), kept
        self.reports[part] = self._report(f"{name}, for {part}", len(table), counts)
        rank_zero_info(self.reports[part])
        if not len(table) and (part == "train" or counts["asked"]):
            raise MisconfigurationException(f"nothing is left to use. {self.reports[part]}")
        return table

    def _report(self, name: str, left: int, counts: Counter[str]) -> str:
        notes = {
            "without image": f"{counts['without image']} left out: no image that can be read",
            "too long": f"{counts['too long']} left out: longer than max_length={self.max_length} tokens of text",
        }
        return "; ".join([f"{name}: {left} questions", *(note for what, note in notes.items() if counts[what])])

    def _read_questions(self) -> list[dict[str, Any]]:
        if self.questions is None:
            raise MisconfigurationException(
                "predict needs --data.questions FILE, a .jsonl file with image and question in each line"
            )
        rows = sources.read_json_lines(self.questions, "questions")
        folder = Path(self.questions).parent if self.image_folder is None else Path(self.image_folder)
        files = [folder.expanduser() / row["image"] for row in rows]
        readable(files)
        return [
            {**row, "line": line, "file": file, "prompt": self.encoder.prompt(row["question"])}
            for line, (row, file) in enumerate(zip(rows, files, strict=True))
        ]


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
        """One batch of columns of rows, as the class says."""
        images = [
            open_image(image, f"the image of {question!r}")
            for image, question in zip(rows["image"], rows["question"], strict=True)
        ]
        inputs = self.encoder(rows["text"], images, padding_side="right")
        labels = answer_labels(inputs, rows["learnt"], rows["rest"])
        batch = {"inputs": inputs, "labels": labels, "answers": rows["answers"], "types": rows["type"]}
        batch["choices"] = rows["choices"]
        return batch | (
            {"prompts": self.encoder(rows["prompt"], images, padding_side="left")} if self.with_prompts else {}
        )


def _rendered(row: dict[str, Any], encoder: QuestionEncoder, known: dict[tuple[str, str], Rendered]) -> dict[str, Any]:
    """A row's columns of :class:`Rendered`; many data sets ask a question of thousands of images."""
    asked = row["question"], expected_answer(row["answers"])
    if asked not in known:
        known[asked] = encoder.render(*asked)
    return known[asked]._asdict()


def _prompts(rows: list[dict[str, Any]], encoder: QuestionEncoder) -> Batch:
    images = [read_image(row["file"]) for row in rows]
    prompts = encoder([row["prompt"] for row in rows], images, padding_side="left")
    return {"prompts": prompts, **{name: [row[name] for row in rows] for name in ("line", "image", "question")}}


def _image_key(image: dict[str, Any] | None) -> str:
    """What decides on an image's part: its content if it is inside the data set, else its file's name."""
    if image is None:
        return ""
    return hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else Path(image["path"]).name


def _check(batch_size: int, max_length: int, num_workers: int, shares: dict[str, float], skips_blindly: bool) -> None:
    problems = [
        f"{name} must be an integer >= {least}, got {value!r}"
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        )
        if value < least
    ]
    if not (min(shares.values()) >= 0 and sum(shares.values()) < 1):
        problems.append(
            "validation_share and test_share must be >= 0 and leave something to train on, "
            f"got {shares['validation']!r} and {shares['test']!r}"
        )
    if skips_blindly:
        problems.append("skip_unreadable needs check_images, which finds what is to be skipped: set it to true")
    if problems:
        raise MisconfigurationException("VQAData: " + "; ".join(problems))


def _check_pixels(max_pixels: int | None, min_pixels: int | None) -> None:
    for name, value in (("max_pixels", max_pixels), ("min_pixels", min_pixels)):
        if value is not None and value < 1:
            raise MisconfigurationException(f"VQAData: {name} must be an integer >= 1 or null, got {value!r}")
    if max_pixels is not None and min_pixels is not None and min_pixels > max_pixels:
        raise MisconfigurationException(
            f"VQAData: min_pixels must not exceed max_pixels, got {min_pixels!r} and {max_pixels!r}"
        )
