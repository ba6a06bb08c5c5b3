"""ContrastiveData: images and captions, split without leaks, in resumable batches."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from recipes.clip.images import Embedded, readable
from recipes.clip_contrastive import sources
from recipes.clip_contrastive.batches import PictureBatches, PictureBatchSampler
from recipes.clip_contrastive.sources import Picture
from recipes.data.parts import Division, indices_in, is_file, refuse_bad_settings, warn_of_training_data
from recipes.data.reading import given_dataset, is_packaged
from recipes.data.resumable import PARTS_OF_STAGE, LateLoader, ResumableData


@dataclass(eq=False)
class ContrastiveData(ResumableData):
    """Images with captions for a contrastive model, with its tokenizer and preprocessing.

    Validation and test are separate data sets or splits, or shares of the training data, chosen by the seed and a hash
    of the image's path (in a table, of its content). An image and all its captions are in one part.

    Args:
        dataset: training data: a .csv, .tsv, .json, .jsonl or .parquet file; a folder of images with a .txt file next
            to each, or with ImageFolder's metadata.jsonl; a Hub name; webdataset shards as ``shards/*.tar``; or
            "packaged:emoji" (more in the docs).
        config_name: configuration of a Hub data set; None if it has only one.
        revision: revision of a Hub data set.
        split: training split of a Hub data set, or of a folder of tables with several.
        validation_dataset: validation data, of the same kinds; None takes ``validation_split``.
        test_dataset: test data; None takes ``test_split``.
        validation_split: a split of ``dataset``, or a file; None takes ``validation_share``.
        test_split: likewise; None takes ``test_share``.
        validation_share: share of the images; None takes the data set's own validation split, or 0.05 if it has none.
        test_share: share of the images; None takes the data set's own test split, or nothing if it has none.
        image_column: column of images, or of paths relative to the table's folder; None takes the first that exists of
            image, filepath, file_name and image_path.
        caption_column: column of captions; an image with several captions has several rows, or a list of them. None
            takes the first that exists of caption, title, text and captions.
        batch_size: images per batch on one device. The loss compares all pairs of all devices' batches.
        eval_batch_size: images per batch in evaluation, each with all its captions. The evaluation's loss is the mean
            over such batches, on any number of devices.
        skip_unreadable: leave out and count broken images, instead of raising an error. Every image is decoded once
            before training to find them.
        seed: seed of the parts, of the order, and of the drawn captions and crops.
        num_workers: processes that load batches; 0 loads in the training process.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read or used (in `setup`, before
            training).
    """

    dataset: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_dataset: str | None = None
    test_dataset: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    validation_share: float | None = None
    test_share: float | None = None
    image_column: str | None = None
    caption_column: str | None = None
    batch_size: int = 64
    eval_batch_size: int = 64
    skip_unreadable: bool = False
    seed: int = 0
    num_workers: int = 0

    deciding: ClassVar[tuple[str, ...]] = ("shares", "seed")

    def __post_init__(self) -> None:
        super().__init__()
        own_splits = {"validation": self.validation_split, "test": self.test_split}
        own_datasets = {"validation": self.validation_dataset, "test": self.test_dataset}
        shares = {"validation": self.validation_share, "test": self.test_share}
        problems = []
        for part, own in own_splits.items():
            if own is not None and own_datasets[part] is not None:
                problems.append(f"{part}_dataset and {part}_split both choose the {part} data: give only one of them")
            elif own is not None and is_file(own):
                own_datasets[part], own_splits[part] = own, None
        self.division = Division(self.dataset, self.split, own_splits, shares, own_datasets, packaged=sources.PACKAGED)
        self.shares = self.division.shares
        least = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0}
        refuse_bad_settings(self, least, self.shares, problems)
        self.parts: dict[str, list[Picture]] = {}
        self.clip: Any = None  # from recipes.clip.model.load_clip; None takes the trained module's

    @override
    def prepare_data(self) -> None:
        given_dataset(self.dataset, sources.PACKAGED)
        for part in ("train", "validation", "test"):
            dataset = self.division.where(part)[0]
            if is_packaged(dataset):
                sources.load_pictures(dataset)  # makes packaged data on one process, before the others look for them

    @override
    def setup(self, stage: str) -> None:
        if self.clip is None:
            self.clip = self.trained_module.clip
        if not sources.has_texts(given_dataset(self.dataset, sources.PACKAGED)):
            self.division.take_own_splits(self.config_name, self.revision)
        self.division.refuse_wrong_splits(stage, option="dataset")
        for part in PARTS_OF_STAGE[stage]:
            if part not in self.parts:
                self.parts[part] = self._checked(part, self._chosen(part))
        if stage == "fit":
            trained = [_identity(picture) for picture in self.parts["train"]]
            held_out = [_identity(picture) for picture in self.parts["validation"]]
            warn_of_training_data("validation", held_out, trained, "images")

    @override
    def loader(self, part: str) -> LateLoader:
        training, pictures, ranks = part == "train", self.parts[part], self.ranks()
        if len(pictures) < ranks["num_replicas"]:
            raise MisconfigurationException(
                f"{part} has {len(pictures)} images for {ranks['num_replicas']} devices: each needs at least one"
            )
        transform = self.clip.preprocess_train if training else self.clip.preprocess_val
        batch_size = self.batch_size if training else self.eval_batch_size
        batches = PictureBatches(pictures, transform, self.clip.tokenizer, training, self.seed)
        sampler = PictureBatchSampler(len(pictures), batch_size, self.seed, shuffle=training, **ranks)
        return self.whole_batches(batches, sampler)

    @override
    def sizes(self) -> str:
        return f"{super().sizes()}, test {self.division.own('test') or len(self._chosen('test'))}"

    # -- which pictures

    @override
    def _refuse_trained_rows(self, trained: dict[str, Any] | None) -> None:
        self.division.refuse_trained_rows(self.trainer, trained, self._trained_on())

    def _chosen(self, part: str) -> list[Picture]:
        """Return a part's pictures, in an order unrelated to their content."""
        if not self.division.is_wanted(part):
            return []
        dataset, split = self.division.where(part)
        columns = self.image_column, self.caption_column
        pictures = sources.load_pictures(dataset, split, *columns, self.config_name, self.revision)
        # File names may hold bytes that are not UTF-8, which ascii() escapes.
        names = {picture.key: ascii(f"{self.seed}/{picture.key}") for picture in pictures}
        pictures.sort(key=lambda picture: hashlib.sha256(names[picture.key].encode()).digest())
        if self.division.own(part) is not None:
            return pictures
        keys = [names[picture.key] for picture in pictures]
        return [pictures[index] for index in indices_in(part, keys, self.shares, dataset, "images")]

    def _checked(self, part: str, pictures: list[Picture]) -> list[Picture]:
        if pictures:
            files = [picture.file for picture in pictures]
            pictures = [pictures[index] for index in readable(files, self.skip_unreadable)]
        captions = sum(len(picture.captions) for picture in pictures)
        rank_zero_info(f"{self.division.where(part)[0]}, {part}: {len(pictures)} images, {captions} captions")
        return pictures


def _identity(picture: Picture) -> str:
    """Return where an image lies, however its path is written; for an image in a table, its content."""
    return picture.key if isinstance(picture.file, Embedded) else os.path.realpath(str(picture.file))
