"""Batches of images and captions, each determined by seed, epoch and index in the data."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from recipes.clip.images import drawing, read_image
from recipes.clip_contrastive.sources import Picture

Batch = dict[str, Tensor]
Transform = Callable[[Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class Draw(NamedTuple):
    """The pictures of one batch, their epoch, and whether the batch repeats pictures to fill the ranks' last turn."""

    epoch: int
    indices: list[int]
    repeats: bool = False


class PictureBatchSampler(DistributedSampler[Draw]):
    """Batches of pictures, determined by the seed and the epoch.

    In training every rank takes ``batch_size`` pictures of each joint batch, in a new order each epoch. As the loss
    compares all pairs of a joint batch, all are full: a remainder at the end of an epoch is dropped, and data smaller
    than a joint batch are shared evenly. In evaluation each picture comes once, in the data's order; ranks take turns
    on the batches, and those that fill up the last turn are marked as repeated.

    Lightning keeps a DistributedSampler as it is, and sets its epoch.

    Args:
        size: number of pictures.
        batch_size: pictures per batch of one rank.
        seed: seed of the order.
        num_replicas: ranks that share the batches.
        rank: rank that takes these batches.
        shuffle: True for training.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, num_replicas: int = 1, rank: int = 0, shuffle: bool = True
    ) -> None:
        # Data smaller than a joint batch would otherwise give no batch, as incomplete ones are dropped.
        share = min(batch_size, size // num_replicas) if shuffle else batch_size
        batches = size // share if shuffle else -(-size // share)
        super().__init__(
            range(batches),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=shuffle,
        )
        self.size, self.share, self.batches = size, share, batches

    def __iter__(self) -> Iterator[Draw]:
        # A generator, so that the epoch is read with the first batch: a resuming trainer asks for the iterator earlier.
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for turn in range(len(self)):
            number = turn * self.num_replicas + self.rank
            start = number % self.batches * self.share
            yield Draw(self.epoch, order[start : start + self.share].tolist(), repeats=number >= self.batches)


@dataclass(eq=False)
class PictureBatches(Dataset[Batch]):
    """Whole batches of a part of the data.

    Training draws one caption per picture, and the augmentation, with a generator seeded by the picture's index and the
    epoch. So neither the number of workers and ranks nor a stop in between changes the batches.

    Args:
        pictures: pictures of this part.
        transform: open_clip's preprocessing of an image into a tensor (3, H, W).
        tokenizer: open_clip's tokenizer, from texts to token ids (n, context length).
        training: take one caption per picture; otherwise all of them.
        seed: seed of captions and augmentation.
    """

    pictures: Sequence[Picture]
    transform: Transform
    tokenizer: Tokenizer
    training: bool
    seed: int = 0

    def __post_init__(self) -> None:
        captions = [] if self.training else _captions(self.pictures)
        self._text_ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}

    def __getitem__(self, draw: Draw) -> Batch:
        return self._drawn(draw) if self.training else self._whole(draw)

    def _drawn(self, draw: Draw) -> Batch:
        images, captions = [], []
        for index in draw.indices:
            picture = self.pictures[index]
            with drawing(self.seed, draw.epoch, index):
                captions.append(random.choice(picture.captions))
                images.append(self._image(picture))
        return {"images": torch.stack(images), "tokens": self.tokenizer(captions)}

    def _whole(self, draw: Draw) -> Batch:
        """Return images with all their captions, and the index of each picture's first caption."""
        pictures = [self.pictures[index] for index in draw.indices]
        captions = _captions(pictures)
        text_ids = torch.tensor([self._text_ids[caption] for caption in captions])
        counts = torch.tensor([len(picture.captions) for picture in pictures])
        image_ids = torch.tensor(draw.indices)
        return {
            "images": torch.stack([self._image(picture) for picture in pictures]),
            "tokens": self.tokenizer(captions),
            "image_ids": image_ids,
            "text_ids": text_ids,
            "pairs": torch.stack([image_ids.repeat_interleave(counts), text_ids], dim=1),
            "first_captions": counts.cumsum(0) - counts,
            "weight": torch.tensor(0.0 if draw.repeats else float(len(pictures))),
        }

    def _image(self, picture: Picture) -> Tensor:
        return self.transform(read_image(picture.file))


def _captions(pictures: Sequence[Picture]) -> list[str]:
    return list(chain.from_iterable(picture.captions for picture in pictures))
