"""Batches of images on any number of ranks, resumable: their order and augmentation."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from typing_extensions import override

from recipes.clip.images import drawing, read_image
from recipes.data.reading import divided

Batch = dict[str, Any]
Draw = tuple[int, int]  # an example, and the number of the draw, which decides its augmentation


class Stream(DistributedSampler[list[Draw]]):
    """One epoch of training: a given number of batches from an endless stream of shuffled passes over few examples.

    All batches are full, and no example comes again before each has come once. Ranks take turns on the batches, so that
    n ranks with batches of b see in a step what one rank with batches of n·b sees. The seed and the epoch determine the
    stream. Lightning keeps a DistributedSampler as it is, and sets its epoch.

    Args:
        examples: number of examples.
        batch_size: examples per batch; fewer if the ranks would share too few examples for that.
        batches: batches per rank and epoch.
        seed: seed of the order.
        num_replicas: ranks that share the batches.
        rank: rank that takes these batches.
    """

    def __init__(
        self, examples: int, batch_size: int, batches: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        # DistributedSampler reads only the length of its data: here the number of all ranks' batches.
        steps = range(batches * num_replicas)
        super().__init__(steps, num_replicas=num_replicas, rank=rank, shuffle=False, seed=seed)  # type: ignore[arg-type]
        self.examples = examples
        self.batch_size = min(batch_size, -(-examples // num_replicas))

    def __iter__(self) -> Iterator[list[Draw]]:
        # A generator, so that the epoch is read with the first batch: a resuming trainer asks for the iterator earlier.
        number = self.total_size * self.batch_size
        passes = []
        for i in range(-(-number // self.examples)):
            passes.append(np.random.default_rng([self.seed, self.epoch, i]).permutation(self.examples))
        order = np.concatenate(passes).tolist()
        for first in range(self.rank * self.batch_size, number, self.num_replicas * self.batch_size):
            yield [(order[i], self.epoch * number + i) for i in range(first, first + self.batch_size)]


class InTurn(DistributedSampler[list[Draw]]):
    """Batches in order for an evaluation: equally many on each rank, with each example once (if there is one per rank).

    Args:
        examples: number of examples.
        batch_size: most examples per batch.
        num_replicas: ranks that share the batches.
        rank: rank that takes these batches.
    """

    def __init__(self, examples: int, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        indices = list(range(examples))
        batches = [indices[i : i + batch_size] for i in range(0, examples, batch_size)]
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches = divided(batches, self.total_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for i in range(self.rank, self.total_size, self.num_replicas):
            yield [(index, 0) for index in self.batches[i % len(self.batches)]]


class Images(Dataset[Batch]):
    """Whole batches of images, read and transformed.

    A batch holds ``images`` (n, 3, height, width), ``labels`` (n,), and ``indices`` and ``paths``, lists of length n.

    Args:
        examples: paths with labels.
        transform: from an RGB image to a tensor.
        seed: with a draw's number it decides the transform's random choices, in whichever process.
    """

    def __init__(self, examples: Sequence[tuple[Path, int]], transform: Callable[[Any], Tensor], seed: int = 0) -> None:
        self.examples = examples
        self.transform = transform
        self.seed = seed

    @override
    def __getitem__(self, draws: list[Draw]) -> Batch:
        chosen = [self.examples[index] for index, _ in draws]
        images = []
        for (path, _), (_, number) in zip(chosen, draws, strict=True):
            with drawing(self.seed, number):
                images.append(self.transform(read_image(path)))
        return {
            "images": torch.stack(images),
            "labels": torch.tensor([label for _, label in chosen]),
            "indices": [index for index, _ in draws],
            "paths": [str(path) for path, _ in chosen],
        }


def train_transform(cfg: PreprocessCfg, crop_scale: tuple[float, float], flip: float) -> Callable[[Any], Tensor]:
    """Compose open_clip's random crop with the protocol's scale and flips.

    Args:
        cfg: the model's image size, mean and standard deviation.
        crop_scale: smallest and largest share of the image's area that is kept.
        flip: probability of a horizontal flip.
    """
    crop = image_transform_v2(cfg, is_train=True, aug_cfg={"scale": crop_scale})
    composed: Callable[[Any], Tensor] = transforms.Compose([transforms.RandomHorizontalFlip(flip), crop])
    return composed
