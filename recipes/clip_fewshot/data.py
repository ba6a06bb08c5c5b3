"""FewShotData: K images per class for training, a few for validation, and all of the test part."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from recipes.clip.images import image_files, readable
from recipes.clip_fewshot import sources
from recipes.clip_fewshot.batches import Images, InTurn, Stream, train_transform
from recipes.clip_fewshot.folders import Example
from recipes.clip_fewshot.prompts import class_names, prompts
from recipes.clip_fewshot.sources import Source, Split
from recipes.data.left_out import few
from recipes.data.parts import refuse_bad_settings, source_of, warn_of_training_data
from recipes.data.resumable import LateLoader, ResumableData
from recipes.offline import emoji

ByClass = dict[int, list[Example]]


@dataclass(eq=False)
class FewShotData(ResumableData):
    """Few-shot classification of images in folders, of CoOp's eleven data sets, or of the packaged emoji.

    Only the seed and the images' names decide which images are drawn; those for K shots are among those for K + 1. One
    epoch is ``iterations_per_shot * shots`` optimizer steps, whatever the number of devices and of accumulated batches.

    Args:
        dataset: a folder with one folder per class, or with folders train, test and optionally validation that hold
            these; or caltech101, dtd, eurosat, fgvc_aircraft, flowers102, food101, imagenet, oxford_pets,
            stanford_cars, sun397, ucf101, packaged:emoji.
        root: folder of CoOp's data sets.
        split: "official" takes the parts of your folders, or of CoOp's split files, as published few-shot results do;
            "seeded" divides all images into 50 % train, 20 % validation and 30 % test of each class. A folder of
            classes is always divided so.
        split_seed: seed of that division, not of the shots.
        shots: training images per class.
        validation_shots: validation images per class, from the validation part or, if there is none, from the rest of
            train; None is min(shots, 4), or as many as every class has.
        seed: seed of the shots, of the order of the batches and of the augmentation.
        batch_size: images per batch on each device.
        iterations_per_shot: optimizer steps per shot.
        eval_batch_size: images per batch in evaluation and prediction.
        templates: a text with {} for the class's name, or several. If the text tower is adapted, training reads the
            first. The default is CLIP-LoRA's, for every data set.
        class_names: words for classes, by the data's own names; the others get CoOp's names, or the folders' names made
            readable.
        crop_scale: smallest and largest share of an image's area that a random crop keeps in training.
        flip: probability of a horizontal flip in training.
        skip_unreadable: leave out unreadable images and say which, instead of raising an error.
        num_workers: processes that load batches; 0 loads in the training process.
        predict_folder: folder of images to classify with `predict`, at any depth.

    Raises:
        MisconfigurationException: arguments out of range (here); images or names that can't be used (in `setup`, before
            training).
    """

    dataset: str | None = None
    root: str = "data"
    split: Split = "official"
    split_seed: int = 0
    shots: int = 4
    validation_shots: int | None = None
    seed: int = 0
    batch_size: int = 32
    iterations_per_shot: int = 500
    eval_batch_size: int = 100
    templates: str | list[str] = "a photo of a {}."
    class_names: dict[str, str] | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    skip_unreadable: bool = False
    num_workers: int = 0
    predict_folder: str | None = None

    deciding: ClassVar[tuple[str, ...]] = ("split_seed",)

    def __post_init__(self) -> None:
        super().__init__()
        least = dict.fromkeys(("shots", "batch_size", "iterations_per_shot", "eval_batch_size"), 1)
        least |= dict.fromkeys(("validation_shots", "num_workers", "seed"), 0)
        missing = ["dataset: give a folder with one folder per class, or the name of a data set"]
        refuse_bad_settings(self, least, more=missing if self.dataset is None else [])
        self.parts: dict[str, list[Example]] = {}
        self.classes: list[str] = []
        self.prompts: list[list[str]] = []

    @override
    def prepare_data(self) -> None:
        if self.dataset == sources.EMOJI:
            emoji.prepare()

    @override
    def setup(self, stage: str) -> None:
        source = sources.load_source(str(self.dataset), self.root, self.split, self.split_seed)
        self.classes = class_names(source, self.class_names)
        self.prompts = prompts(self.classes, self.templates)
        if stage == "predict":
            self.parts["predict"] = self._images_to_predict()
            return
        if stage in ("fit", "validate") and "train" not in self.parts:
            drawn = few_shots(source, self.shots, self.validation_shots, self.seed, self.skip_unreadable)
            self.parts["train"], self.parts["validation"] = drawn
        if stage in ("fit", "test") and "test" not in self.parts:  # before training: a run ends with a test
            test = source.parts["test"]
            kept = readable([path for path, _ in test], self.skip_unreadable)
            self.parts["test"] = [test[index] for index in kept]
        counts = ", ".join(f"{len(examples)} {part}" for part, examples in self.parts.items())
        classes = f"{len(self.classes)} classes, {few(list(source.classes))}"
        rank_zero_info(f"{self.dataset} ({source.note}): {classes}; images: {counts}")
        if stage == "fit":
            warn_of_equal_images(self.parts)

    @override
    def predict_dataloader(self) -> LateLoader:
        return self.loader("predict")

    @override
    def loader(self, part: str) -> LateLoader:
        module, trainer = self.trained_module, cast("L.Trainer", self.trainer)
        examples = self.parts[part]
        if part == "train":
            # FMLoRA's module accumulates gradients itself.
            accumulated = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
            steps = self.iterations_per_shot * self.shots
            sampler: Any = Stream(len(examples), self.batch_size, steps * accumulated, seed=self.seed, **self.ranks())
            transform = train_transform(module.preprocess_cfg, self.crop_scale, self.flip)
        else:
            sampler = InTurn(len(examples), self.eval_batch_size, **self.ranks())
            transform = module.clip.preprocess_val
        return self.whole_batches(Images(examples, transform, self.seed), sampler)

    @override
    def _refuse_trained_rows(self, trained: dict[str, Any] | None) -> None:
        """Refuse to test a checkpoint if the images are divided otherwise than in its run."""
        if trained is None or self.trainer is None or self.trainer.state.fn != TrainerFn.TESTING:
            return
        now = self._trained_on()
        there = {name: trained[name] for name in ("split", *self.deciding)}
        is_same = source_of(str(trained["dataset"]), "") == source_of(str(self.dataset), "")
        if is_same and any(now[name] != value for name, value in there.items()):
            divided = ", ".join(f"--data.{name} {value}" for name, value in there.items())
            raise MisconfigurationException(
                f"test: the parts of {self.dataset} differ from those of the checkpoint's run, so images may be tested "
                f"on which it was trained: give {divided}"
            )

    def _images_to_predict(self) -> list[Example]:
        paths = image_files(Path(self.predict_folder).expanduser()) if self.predict_folder else []
        if not paths:
            raise MisconfigurationException(
                f"predict needs --data.predict_folder FOLDER with images, but there are none in {self.predict_folder!r}"
            )
        return [(paths[index], -1) for index in readable(paths, self.skip_unreadable)]


def warn_of_equal_images(parts: Mapping[str, Sequence[Example]]) -> None:
    """Warn of files with the same bytes in training and in another part.

    Args:
        parts: "train" and others.
    """
    digests = {}
    for part, examples in parts.items():
        digests[part] = [hashlib.sha256(path.read_bytes()).digest() for path, _ in examples]
    for part in parts.keys() - {"train"}:
        warn_of_training_data(part, digests[part], digests["train"], "images")


def few_shots(
    source: Source, shots: int, validation_shots: int | None, seed: int, skip_unreadable: bool = False
) -> tuple[list[Example], list[Example]]:
    """Draw the images for training and validation, in the order of their classes.

    Args:
        source: the data.
        shots: training images per class.
        validation_shots: validation images per class, from the validation part, or else from the rest of train; None is
            min(shots, 4), or as many as every class has.
        seed: seed of the draw.
        skip_unreadable: draw another image in place of an unreadable one, instead of raising an error.

    Raises:
        MisconfigurationException: a class has too few images, or an image can't be read.
    """
    labels = range(len(source.classes))
    broken: set[Path] = set()
    while True:
        train, rest, part = _pools(source, shots, seed, broken)
        _check_counts(source, train, "train", "shots", shots)
        number = validation_shots
        if number is None:
            number = min(shots, 4, *(len(rest.get(label, [])) for label in labels))
        _check_counts(source, rest, part, "validation_shots", number)
        training, validation = [], []
        for label in labels:
            training += train[label][:shots]
            # Without a validation part a class may have no image left, and is then missing from the rest.
            validation += rest[label][:number] if number else []
        paths = [path for path, _ in training + validation]
        kept = readable(paths, skip_unreadable)
        if len(kept) == len(paths):
            return training, validation
        # The next round draws others in place of the unreadable ones.
        broken |= set(paths) - {paths[index] for index in kept}


def _pools(source: Source, shots: int, seed: int, broken: set[Path]) -> tuple[ByClass, ByClass, str]:
    """Return each class's images for training and for validation, in the order of the draw, and the latter's part."""

    def drawn(part: str) -> ByClass:
        examples = sources.in_order(source.parts[part], seed)
        return sources.by_class(example for example in examples if example[0] not in broken)

    train = drawn("train")
    if "validation" in source.parts:
        return train, drawn("validation"), "validation"
    # From the end, so that another number of shots leaves the same ones for validation.
    left = {label: examples[shots:][::-1] for label, examples in train.items()}
    return train, left, f"train beside {shots} shots"


def _check_counts(source: Source, by_label: ByClass, part: str, argument: str, needed: int) -> None:
    counts = [(name, len(by_label.get(label, []))) for label, name in enumerate(source.classes)]
    few = [(name, count) for name, count in counts if count < needed]
    if few:
        raise MisconfigurationException(
            f"{source.name}: class {few[0][0]!r} has {few[0][1]} images in {part} ({source.note}), too few for "
            f"{argument}={needed}, as {len(few) - 1} other classes have. Lower {argument}, add images, or divide "
            "them again with split=seeded"
        )
