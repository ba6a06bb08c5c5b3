"""What is done to a trained adapter, or to the texts that it reads, before it is judged once more."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor

from recipes.evidence.module import ShotsClassifier


@dataclass(frozen=True)
class Condition:
    """Under which an adapter is judged.

    Attributes:
        title: what the report calls it.
        change: what is done to the module, in place; None leaves it as it is.
        typos: the share of the letters of the test texts that are hit.
    """

    title: str
    change: Callable[[ShotsClassifier], None] | None = None
    typos: float = 0.0


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix rounded row by row to 2^bits - 1 values with even distances, symmetric about 0.

    The outermost values of a row are plus and minus the largest magnitude in it. Nothing is clipped.

    Args:
        weight: (rows, columns).
        bits: at least 2.

    Example:
        >>> rounded(torch.tensor([[1.0, -0.6, 0.4, 0.0]]), bits=2)
        tensor([[ 1., -1.,  0.,  0.]])
    """
    largest_level = 2 ** (bits - 1) - 1
    step: Tensor = weight.abs().amax(dim=1, keepdim=True) / largest_level
    # A row of zeros has no step, and stays as it is.
    levels: Tensor = (weight / step.where(step > 0, 1.0)).round()
    return levels * step


@torch.no_grad()
def round_adapter(module: ShotsClassifier, bits: int) -> None:
    """Round the rows of each A (r, n) and of each B (m, r); the head and the encoder's own weights stay."""
    for layer in module.adapted_layers:
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.weight.copy_(rounded(factor.weight, bits))


@torch.no_grad()
def round_merged(module: ShotsClassifier, bits: int) -> None:
    """Merge each adapted layer's W + s B A (m, n), and round its rows; all else stays, other linear layers too."""
    for layer in module.adapted_layers:
        layer.merge()
        weight = layer.get_base_layer().weight
        weight.copy_(rounded(weight, bits))


def scale_adapter(module: ShotsClassifier, factor: float) -> None:
    """Multiply the s of W + s B A by a factor."""
    for layer in module.adapted_layers:
        layer.scale_layer(factor)


def with_typos(text: str, share: float) -> str:
    """A text in which letters have been swapped or dropped; equal texts get equal typos.

    From left to right, each letter is hit with the probability ``share``. With equal chances it is then dropped, or
    swapped with the letter behind it. A letter with no letter behind it is always dropped, and one that has been
    swapped with its neighbour is not hit again.

    Example:
        >>> with_typos("nerve supply", 0.0)
        'nerve supply'
    """
    # By the text itself, so that neither the order of the texts nor a run's seed changes the typos.
    random = Random(f"{share}/{text}")
    typed = ""
    place = 0
    while place < len(text):
        letter, following = text[place], text[place + 1 : place + 2]
        place += 1
        if not letter.isalpha() or random.random() >= share:
            typed += letter
        elif random.random() < 0.5 and following.isalpha():
            typed += following + letter
            place += 1
    return typed


AS_TRAINED = "as_trained"
CONDITIONS: dict[str, Condition] = {AS_TRAINED: Condition("as trained")}
for _bits in (4, 3, 2):
    CONDITIONS[f"adapter_{_bits}_bits"] = Condition(f"adapter in {_bits} bits", partial(round_adapter, bits=_bits))
for _bits in (8, 4):
    CONDITIONS[f"merged_{_bits}_bits"] = Condition(f"merged, {_bits} bits", partial(round_merged, bits=_bits))
for _factor in (0.5, 0.75, 1.25, 1.5):
    CONDITIONS[f"scale_{_factor:g}"] = Condition(f"scale x {_factor:g}", partial(scale_adapter, factor=_factor))
for _share in (0.05, 0.1):
    CONDITIONS[f"typos_{_share:g}"] = Condition(f"typos, {100 * _share:g} % of letters", typos=_share)
