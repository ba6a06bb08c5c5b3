"""ContrastiveData: images and captions, split without leaks, in batches that a resumed run continues."""

import hashlib
import os
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from recipes.clip.images import Embedded, blind_skips, readable
from recipes.clip.model import too_long
from recipes.clip_contrastive import sources
from recipes.clip_contrastive.batches import PictureBatches, PictureBatchSampler
from recipes.clip_contrastive.sources import Picture
from recipes.shared.data import given_dataset
from recipes.shared.parted_data import PartedData
from recipes.shared.parts import places_in, refuse_bad_settings, warn_of_training_data
from recipes.shared.resumable import PARTS_OF_STAGE, LateLoader


@dataclass(eq=False)
class ContrastiveData(PartedData):
    """Images with captions for a contrastive model, whose tokenizer and preprocessing are used.

    Validation and test are data sets or splits of their own, or shares of the training data, chosen by the seed and a
    hash of the image's path, or of its content if it is in a table: with all its captions an image is in one part.

    Args:
        dataset: for training: a .csv, .tsv, .json, .jsonl or .parquet file; a folder of images with a .txt file beside
            each, a captions.csv or ImageFolder's metadata.jsonl; a Hub name; webdataset shards as
            ``shards/{000..009}.tar``; or "packaged:emoji" (more in the docs).
        config_name: which of a Hub data set's configurations; None where it has one.
        revision: of a Hub data set.
        split: for training, of a Hub data set or a folder with several.
        validation_dataset: for validation, of the same kinds; None takes ``validation_split``.
        test_dataset: for testing; None takes ``test_split``.
        validation_split: a split of ``dataset``; None takes ``validation_share``.
        test_split: likewise; None takes ``test_share``.
        validation_share: share of the images; None takes the split that the data set has for it, or 0.05 without one.
        test_share: share of the images; None takes the split that the data set has for it, or nothing without one.
        image_column: of a table: images, or their paths, relative to the table's folder; None takes the first of
            image, filepath, file_name and image_path that is there.
        caption_column: of a table; an image with several captions has several lines, or a list of them. None takes the
            first of caption, title, text and captions.
        batch_size: images of a batch on one device. The loss compares all pairs of all devices' batches.
        eval_batch_size: images of a batch in evaluation, each with all its captions. The evaluation's loss is the mean
            over such batches, on any number of devices.
        refuse_long_captions: an error where captions don't fit into the model's context length; otherwise they are cut
            there, as open_clip does, and counted.
        check_images: decode every image once before training, to find broken ones.
        skip_unreadable: leave out, and count, images that ``check_images`` finds broken, instead of an error.
        seed: of the parts, of the order, and of the drawing of captions and crops.
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
    refuse_long_captions: bool = False
    check_images: bool = True
    skip_unreadable: bool = False
    seed: int = 0
    num_workers: int = 0

    packaged: ClassVar[str] = sources.PACKAGED
    predicts: ClassVar[bool] = False
    deciding: ClassVar[tuple[str, ...]] = ("shares", "seed")

    def __post_init__(self) -> None:
        super(PartedData, self).__init__()
        self.own_datasets = {"validation": self.validation_dataset, "test": self.test_dataset}
        self.own_splits = {"validation": self.validation_split, "test": self.test_split}
        problems = blind_skips(self.skip_unreadable, self.check_images)
        for part, own in self.own_datasets.items():
            if own is not None and self.own_splits[part] is not None:
                verb = {"test": "tests", "validation": "validates"}[part]
                problems.append(f"{part}_dataset and {part}_split both say what {verb}: give one of them")
            if own is not None:
                setattr(self, f"{part}_share", 0.0)  # nor is a split of the training data's wanted
        self.shares = self.known_shares()
        least = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0}
        refuse_bad_settings(self, least, self.shares, problems)
        self.parts: dict[str, list[Picture]] = {}
        self.clip: Any = None  # what recipes.clip.model.load_clip gives; None takes the Trainer's module's

    @override
    def prepare_data(self) -> None:
        for dataset in (given_dataset(self.dataset, sources.PACKAGED), *filter(None, self.own_datasets.values())):
            sources.fetch(dataset)

    @override
    def setup(self, stage: str) -> None:
        if self.clip is None:
            if self.trainer is None:
                raise MisconfigurationException(
                    "ContrastiveData takes the model's tokenizer: set .clip, or use a Trainer"
                )
            self.clip = self.trainer.lightning_module.clip
        if sources.has_splits(given_dataset(self.dataset, sources.PACKAGED)):
            self.take_own_splits()
        if stage == "fit":
            self._refuse_training_data()
        for part in PARTS_OF_STAGE[stage]:
            if part not in self.parts:
                self.parts[part] = self._checked(part, self._chosen(part))
        if stage == "fit":
            trained = [_identity(picture) for picture in self.parts["train"]]
            held_out = [_identity(picture) for picture in self.parts["validation"]]
            warn_of_training_data("validation", held_out, trained, "images")
        # Every stage except fit has a single part, the one that the loop ends with.
        elif not self.parts[part]:
            raise MisconfigurationException(
                f"there is nothing to evaluate on: give {part}_dataset, which was not trained on, or train with "
                f"{part}_share=0.1, say"
            )

    def _refuse_training_data(self) -> None:
        problems = []
        for part, own in self.own_datasets.items():
            if own is not None and os.path.realpath(own) == os.path.realpath(str(self.dataset)):
                problems.append(
                    f"{part}_dataset={own!r} is what is trained on: give another one, or null, which holds out a share"
                )
        refuse_bad_settings(self, {}, more=problems)

    @override
    def loader(self, part: str) -> LateLoader:
        training, pictures, ranks = part == "train", self.parts[part], self.ranks()
        if len(pictures) < ranks["num_replicas"]:
            raise MisconfigurationException(
                f"{part} has {len(pictures)} images for {ranks['num_replicas']} devices: each needs one at least"
            )
        transform = self.clip.preprocess_train if training else self.clip.preprocess_val
        batch_size = self.batch_size if training else self.eval_batch_size
        batches = PictureBatches(pictures, transform, self.clip.tokenizer, training, self.seed)
        sampler = PictureBatchSampler(len(pictures), batch_size, self.seed, shuffle=training, **ranks)
        return self.whole_batches(batches, sampler)

    # -- which pictures

    @override
    def place(self, part: str) -> tuple[str, str]:
        own = self.own_datasets.get(part)
        return super().place(part) if own is None else (own, "train")

    def _chosen(self, part: str) -> list[Picture]:
        """A part's pictures, in an order that has nothing to do with what they show."""
        share = self.shares.get(part)
        if part != "train" and not (self.own_datasets.get(part) or self.own_splits.get(part) or share):
            return []
        dataset, split = self.place(part)
        columns = self.image_column, self.caption_column
        pictures = sources.load_pictures(dataset, split, *columns, self.config_name, self.revision)
        # Names of files may hold bytes that are no UTF-8, which ascii() writes as something else.
        names = {picture.key: ascii(f"{self.seed}/{picture.key}") for picture in pictures}
        pictures.sort(key=lambda picture: hashlib.sha256(names[picture.key].encode()).digest())
        if part == "train" or share:
            keys = [names[picture.key] for picture in pictures]
            pictures = [pictures[place] for place in places_in(part, keys, self.shares, dataset, "images")]
        return pictures

    def _checked(self, part: str, pictures: list[Picture]) -> list[Picture]:
        if self.check_images and pictures:
            files = [picture.file for picture in pictures]
            pictures = [pictures[place] for place in readable(files, self.skip_unreadable)]
        captions = list(chain.from_iterable(picture.captions for picture in pictures))
        report = (
            f"{self.own_datasets.get(part) or self.dataset}, {part}: {len(pictures)} images, {len(captions)} captions"
        )
        length = self.clip.tokenizer.context_length
        long = too_long(captions, self.clip.tokenizer, length)
        if long:
            note = f"{len(long)} of them longer than the context_length of {length} tokens, such as {long[0]!r}"
            if self.refuse_long_captions:
                raise MisconfigurationException(
                    f"{report}, {note}: shorten them, or set refuse_long_captions to false to have them cut"
                )
            report += f", {note}: cut there"
        rank_zero_info(report)
        return pictures


def _identity(picture: Picture) -> str:
    """Where an image lies, however its path is written; of an image in a table its content."""
    return picture.key if isinstance(picture.file, Embedded) else os.path.realpath(str(picture.file))
