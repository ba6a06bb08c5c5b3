"""Batches of conversations of similar length: their order and their tensors."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from recipes.data.reading import divided
from recipes.data.resumable import LateLoader, ResumableData
from recipes.language.chat import IGNORED

Batch = dict[str, Any]
_POOL = 16  # this many batches of random examples are sorted by length together


class LengthBatchSampler(DistributedSampler[list[int]]):
    """Batches of similar length in random order, determined by the seed and the epoch.

    A stateful loader resumes it by skipping the batches it has given. Lightning keeps a DistributedSampler as it is,
    and sets its epoch; ranks take turns on the batches. To give each rank as many, training repeats some batches;
    without shuffling some are divided instead, so that an evaluation sees each example once.

    Args:
        lengths: tokens of each example.
        batch_size: examples per batch.
        seed: seed of the order.
        num_replicas: ranks that share the batches.
        rank: rank that takes these batches.
        shuffle: take a new order each epoch; False keeps that of epoch 0, in which any first part is still a fair
            sample.
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
        # DistributedSampler reads only the length of its data: here the number of batches.
        batches = range(-(-len(lengths) // batch_size))
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that the epoch is read with the first batch: a resuming trainer asks for the iterator earlier.
        batches = self._batches(self.epoch if self.shuffle else 0)
        if not self.shuffle:
            batches = divided(batches, self.total_size)
        padded = [batches[i % len(batches)] for i in range(self.total_size)]  # equally many for each rank
        yield from padded[self.rank :: self.num_replicas]

    def _batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        pool = self.batch_size * _POOL
        # Sorted as a whole, the same examples would share a batch in every epoch; sorted in random pools they do not.
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        # Stable, so that examples of one length keep the order that was drawn, whatever NumPy's algorithm.
        by_length = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        batches = [by_length[i : i + self.batch_size].tolist() for i in range(0, len(by_length), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]


def loader_by_length(data: ResumableData, rows: Any, collate: Callable[[Any], Any], is_training: bool) -> LateLoader:
    """Return a loader of batches of similar length.

    Args:
        data: the data module, for the size of a batch, the seed and the ranks.
        rows: a table with a column ``length``.
        collate: makes a batch of rows that are given in columns.
        is_training: take a new order each epoch, in which some batches may come twice.
    """
    sampler = LengthBatchSampler(rows["length"], data.batch_size, data.seed, shuffle=is_training, **data.ranks())
    return data.whole_batches(rows, sampler, collate)


def collate(examples: dict[str, list[Any]], pad_id: int) -> Batch:
    """Return rows of the encoded data, given in columns, as one batch, padded on the right.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels``, with one row per option of each example (in
    training and for free answers: one), ``options`` (number of rows per example), ``gold`` (row of each example's right
    answer), and for free answers in evaluation ``prompt_ids`` and ``answers``.

    Rows of several conversations (:func:`recipes.language.packing.packed`) get only ``input_ids``, ``labels`` and
    ``position_ids``: transformers tells by the positions where a conversation begins, and only without an attention
    mask.

    Args:
        examples: the columns.
        pad_id: token that pads short rows.
    """
    rows = padded(list(chain.from_iterable(examples["input_ids"])), pad_id)
    labels = pad([torch.tensor(row) for row in chain.from_iterable(examples["labels"])], IGNORED)
    if "position_ids" in examples:
        # Each padding token is a conversation by itself, which nothing else reads.
        positions = pad([torch.tensor(positions) for positions in examples["position_ids"]], 0)
        return {"input_ids": rows["input_ids"], "labels": labels, "position_ids": positions}
    counts = [len(options) for options in examples["input_ids"]]
    starts = np.cumsum([0, *counts[:-1]])
    return {
        **rows,
        "labels": labels,
        "options": counts,
        "gold": torch.tensor(starts + np.asarray(examples["gold"])),
        "prompt_ids": examples["prompt_ids"],
        "answers": examples["answer"],
    }


def padded(token_ids: Sequence[list[int]], pad_id: int) -> Batch:
    """Return rows of tokens as ``input_ids`` and ``attention_mask``, padded on the right.

    Example:
        >>> padded([[5], [6, 7]], 0)["attention_mask"].tolist()
        [[1, 0], [1, 1]]
    """
    rows = [torch.tensor(ids) for ids in token_ids]
    return {"input_ids": pad(rows, pad_id), "attention_mask": pad([torch.ones_like(row) for row in rows], 0)}


def pad(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    """Return rows of different lengths as one matrix (rows, longest).

    Example:
        >>> pad([torch.tensor([1]), torch.tensor([2, 3])], 0).tolist()
        [[1, 0], [2, 3]]
    """
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def padding_id(tokenizer: Any) -> int:
    """Return the padding token: the end token if the tokenizer has no padding token, as with Llama and GPT-2.

    Labels and attention masks depend on positions, not on tokens, so end tokens are learnt all the same.

    Raises:
        MisconfigurationException: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise MisconfigurationException(
        f"the tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end token: set its eos_token, "
        "save it, and give the folder as tokenizer"
    )
