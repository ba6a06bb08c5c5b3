"""Batches of conversations of similar length: which examples, in which order, in which tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from recipes.instruction_tuning.chat import IGNORED

Batch = dict[str, Any]
_POOL = 16  # batches' worth of random examples that are sorted by length together


class LengthBatchSampler(DistributedSampler[list[int]]):
    """Batches of similar length in random order: a pure function of the seed and the epoch.

    A stateful loader resumes it by passing over the batches it has given. As a DistributedSampler it is left in place
    by Lightning, which tells it the epoch; ranks take turns on the batches. For each to have as many, training repeats
    some batches; without shuffling some are divided instead, so that an evaluation sees each example once.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a batch.
        seed: of the order.
        num_replicas: ranks that share the batches.
        rank: whose batches these are.
        shuffle: a new order each epoch; False keeps epoch 0's, in which any first part is still a fair sample.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
    ) -> None:
        batches = range(-(-len(lengths) // batch_size))
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that the epoch is read with the first batch: a resuming trainer asks for the iterator earlier.
        batches = self._batches(self.epoch if self.shuffle else 0)
        if not self.shuffle:
            batches = divided(batches, self.total_size)
        padded = [batches[i % len(batches)] for i in range(self.total_size)]  # every rank takes as many
        yield from padded[self.rank :: self.num_replicas]

    def _batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        pool = self.batch_size * _POOL
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        by_length = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        batches = [by_length[i : i + self.batch_size].tolist() for i in range(0, len(by_length), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]


class Collate:
    """Rows of the encoded data as one batch, padded on the right.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels``, one row for each option of each example (training
    and free answers: one), ``options`` (rows of each example), ``gold`` (row of each example's right answer), and for
    free answers in evaluation ``prompt_ids`` and ``answers``.

    Args:
        pad_id: the token that fills up short rows.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: dict[str, list[Any]]) -> Batch:
        """One batch of columns of rows, as the class says."""
        counts = [len(options) for options in examples["input_ids"]]
        starts = np.cumsum([0, *counts[:-1]])
        ids = [torch.tensor(row) for options in examples["input_ids"] for row in options]
        labels = [torch.tensor(row) for options in examples["labels"] for row in options]
        return {
            "input_ids": pad(ids, self.pad_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "labels": pad(labels, IGNORED),
            "options": counts,
            "gold": torch.tensor(starts + np.asarray(examples["gold"])),
            "prompt_ids": examples["prompt_ids"],
            "answers": examples["answer"],
        }


def divided(batches: list[list[int]], number: int) -> list[list[int]]:
    """As many batches as asked for, or as can be, with the same examples in the same order: the last long are halved.

    Example:
        >>> divided([[1, 2], [3, 4], [5]], 5)
        [[1], [2], [3], [4], [5]]
    """
    batches = list(batches)
    while len(batches) < number:
        place = max(range(len(batches)), key=lambda i: (len(batches[i]), i))
        halves = batches[place][: len(batches[place]) // 2], batches[place][len(batches[place]) // 2 :]
        if not halves[0]:
            break
        batches[place : place + 1] = halves
    return batches


def pad(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    """Rows of different lengths as one matrix (rows, longest).

    Example:
        >>> pad([torch.tensor([1]), torch.tensor([2, 3])], 0).tolist()
        [[1, 0], [2, 3]]
    """
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
