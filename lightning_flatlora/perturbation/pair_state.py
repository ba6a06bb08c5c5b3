"""What is kept of a pair from one search of the model to the next, and in a checkpoint."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PairState(NamedTuple):
    """The state of one pair.

    Attributes:
        E: its perturbation, shape (n, r).
        has_average: whether its moving average has begun, also as a tensor of shape ().
        scaling: s of the pair when E was computed.
    """

    E: Tensor
    has_average: bool | Tensor
    scaling: float


def state_problems(
    saved: Mapping[str, PairState], expected: Mapping[str, torch.Size], may_come: Collection[str]
) -> list[str]:
    """List why saved states are of other pairs.

    Args:
        saved: by the pairs' names.
        expected: the shapes of E, by the names of the pairs that are there.
        may_come: names of pairs that the model has and does not train yet.
    """
    problems = []
    for name, shape in expected.items():
        if name not in saved:
            problems.append(f"{name} is not in the checkpoint")
        elif saved[name].E.shape != shape:
            problems.append(other_shape(name, shape, saved[name]))
    for name in saved:
        if name not in expected and name not in may_come:
            problems.append(f"{name} is in the checkpoint but not in the model")
    return problems


def other_shape(name: str, shape: torch.Size, saved: PairState) -> str:
    """Say that a saved E has another shape."""
    return f"{name} has shape {tuple(shape)}, in the checkpoint {tuple(saved.E.shape)}"


def problems_text(problems: list[str]) -> str:
    """Name the first three of many problems."""
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
