"""The examples that a seed draws, their noisy labels, and batches in which short texts share a row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from recipes.evidence.workloads import Settings
from recipes.language import texts
from recipes.language.packing import fill_rows
from recipes.language.texts import Example

Batch = dict[str, Tensor]
_EVAL_BATCH = 64


def training_examples(settings: Settings, seed: int, states: Callable[[str], Tensor]) -> list[Example]:
    """What a seed draws to train on, with the workload's share of false labels.

    Args:
        settings: of the workload.
        seed: of the examples and of their noise.
        states: gives the hidden states of a text, which say where needed what classes are similar.
    """
    drawn = texts.shots(settings["data"], settings["shots"], seed)
    classes = len(texts.TASKS[settings["data"]].classes)
    similar = most_similar_classes(drawn, classes, states) if settings.get("noise_to") == "most_similar" else None
    return with_noise(drawn, settings["noise"], classes, seed, similar)


def most_similar_classes(examples: Sequence[Example], classes: int, states: Callable[[str], Tensor]) -> list[int]:
    """For each class the other one whose mean hidden state is the nearest, by the Euclidean distance.

    Args:
        examples: with their true labels, at least one of each class.
        classes: their number.
        states: gives the hidden states of a text (tokens, d), of which the mean is taken.
    """
    of_texts = torch.stack([states(example.text).mean(dim=0) for example in examples])
    labels = torch.tensor([example.label for example in examples])
    means = torch.stack([of_texts[labels == label].mean(dim=0) for label in range(classes)])
    distances = torch.cdist(means, means).fill_diagonal_(torch.inf)
    nearest: list[int] = distances.argmin(dim=1).tolist()
    return nearest


def with_noise(
    examples: Sequence[Example], share: float, classes: int, seed: int, similar: Sequence[int] | None = None
) -> list[Example]:
    """Examples of which a share has another class in place of its own.

    Args:
        examples: with their true labels.
        share: of the examples, in [0, 1], rounded to whole ones.
        classes: their number.
        seed: draws which examples, and for each another class, all equally likely.
        similar: by class, the one that takes its place; None draws it.
    """
    random = torch.Generator().manual_seed(seed)
    noisy = list(examples)
    chosen = torch.randperm(len(examples), generator=random)[: round(share * len(examples))]
    shifts = torch.randint(1, classes, (len(chosen),), generator=random)
    for place, shift in zip(chosen.tolist(), shifts.tolist(), strict=True):
        example = examples[place]
        # A shift of 0 would be the true class.
        other = (example.label + shift) % classes if similar is None else similar[example.label]
        noisy[place] = example._replace(label=other)
    return noisy


def batch_places(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which examples are in the batch of each step.

    Each epoch is in a new random order and is cut into whole batches, without the rest. A longer run begins with the
    batches of a shorter one.

    Raises:
        ValueError: there are too few examples for one batch.
    """
    if examples < batch_size:
        raise ValueError(f"there are {examples} examples to train on, fewer than a batch of {batch_size}")
    # Of its own, so that all methods see the same batches, however many random numbers they draw.
    random = torch.Generator().manual_seed(seed)
    places: list[list[int]] = []
    while len(places) < steps:
        order = torch.randperm(examples, generator=random).tolist()
        for start in range(0, examples - batch_size + 1, batch_size):
            places.append(order[start : start + batch_size])
    return places[:steps]


class TrainingBatches(Dataset[Batch]):
    """One batch for each step, made when it is asked for.

    Args:
        examples: to train on.
        places: of the examples in each batch.
        states: gives the hidden states of a text.
    """

    def __init__(
        self, examples: Sequence[Example], places: Sequence[Sequence[int]], states: Callable[[str], Tensor]
    ) -> None:
        self.examples = examples
        self.places = places
        self.states = states

    def __len__(self) -> int:
        return len(self.places)

    @override
    def __getitem__(self, step: Any) -> Batch:
        return packed([self.examples[place] for place in self.places[step]], self.states)


def evaluation_batches(examples: Sequence[Example], states: Callable[[str], Tensor]) -> list[Batch]:
    """All examples once, those of similar length together."""
    # Texts of one length fill their rows without padding.
    by_length = sorted(examples, key=lambda example: len(states(example.text)))
    starts = range(0, len(by_length), _EVAL_BATCH)
    return [packed(by_length[start : start + _EVAL_BATCH], states) for start in starts]


def packed(examples: Sequence[Example], states: Callable[[str], Tensor]) -> Batch:
    """A batch in which short texts stand in one row, as long as the longest text, so that little is padding.

    Args:
        examples: n texts and their classes.
        states: gives the hidden states of a text (tokens, d).

    Returns:
        ``hidden`` (R, T, d), ``owners`` (R, T), the place of each token's text among the examples, -1 for padding, and
        ``labels`` (n,).
    """
    of_texts = [states(example.text) for example in examples]
    lengths = [len(one) for one in of_texts]
    longest = max(lengths)
    rows = fill_rows(lengths, room=longest)
    # The values of the padding do not matter: no text attends to places whose owner is -1, and no mean counts them.
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
