"""Batches for training and evaluation, in which short texts share a row."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from recipes.language.packing import fill_rows
from recipes.offline.texts import Example

Batch = dict[str, Tensor]
States = Callable[[str], Tensor]
"""Gives the hidden states of a text, (tokens, d)."""

_EVAL_BATCH = 64


def training_batches(
    examples: Sequence[Example], states: States, batch_size: int, steps: int, seed: int
) -> DataLoader[Batch]:
    """Make a batch for each step, from passes over the examples, each in a new random order."""
    # The order has its own generator: all methods see the same batches, however many random numbers they draw.
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(range(len(examples)), num_samples=steps * batch_size, generator=generator)
    collate = partial(packed, states=states)
    return DataLoader(examples, batch_size=batch_size, sampler=order, collate_fn=collate)  # type: ignore[arg-type]


def evaluation_batches(examples: Sequence[Example], states: States) -> list[Batch]:
    """Return all examples once, those of similar length together."""
    # Texts of one length fill their rows without padding.
    by_length = sorted(examples, key=lambda example: len(states(example.text)))
    starts = range(0, len(by_length), _EVAL_BATCH)
    return [packed(by_length[start : start + _EVAL_BATCH], states) for start in starts]


def packed(examples: Sequence[Example], states: States) -> Batch:
    """Make a batch in which short texts share a row, as long as the longest text, so that there is little padding.

    Args:
        examples: n texts and their classes.
        states: give the hidden states of a text.

    Returns:
        ``hidden`` (R, T, d), ``owners`` (R, T), the index of each token's text among the examples, -1 for padding, and
        ``labels`` (n,).
    """
    of_texts = [states(example.text) for example in examples]
    lengths = [len(one) for one in of_texts]
    longest = max(lengths)
    rows = fill_rows(lengths, room=longest)
    # The values of the padding do not matter: no text attends to positions whose owner is -1, and no mean counts them.
    hidden = of_texts[0].new_zeros(len(rows), longest, of_texts[0].shape[1])
    owners = torch.full((len(rows), longest), -1)
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            end = start + len(of_texts[member])
            hidden[row, start:end] = of_texts[member]
            owners[row, start:end] = member
            start = end
    return {"hidden": hidden, "owners": owners, "labels": torch.tensor([example.label for example in examples])}
