"""Which optimizer trains which pair."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from torch.optim import Optimizer

from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.pairs.lora_pair import LoRAPair, PairSearch


class PairAssignment(NamedTuple):
    """Which optimizer trains which pair.

    Attributes:
        pairs: for each optimizer, the pairs whose factors it holds, untrained ones last.
        orphans: pairs with a trained B, not spread, of which a trained factor is in no optimizer.
        spread: pairs whose factors are in several optimizers.
    """

    pairs: list[list[LoRAPair]]
    orphans: list[LoRAPair]
    spread: list[LoRAPair]


def assign_pairs(search: PairSearch, optimizers: Sequence[Optimizer], before: list[list[LoRAPair]]) -> PairAssignment:
    """Find the optimizer of each pair, even of pairs that are unfrozen or activated only later.

    ``before`` holds the pairs of the last assignment, of which a fixed A stays fixed while no optimizer holds it.
    """
    assignment = PairAssignment([[] for _ in optimizers], [], [])
    fixed = {pair.key for pair in chain.from_iterable(before) if pair.A_is_fixed}
    held = [set(map(id, parameters_of(optimizer))) for optimizer in optimizers]
    for pair in (*search.pairs, *search.resting):
        # E involves a division by the scaling.
        if pair.scaling == 0:
            continue
        of_A = {index for index, identities in enumerate(held) if id(pair.A) in identities}
        of_B = {index for index, identities in enumerate(held) if id(pair.B) in identities}
        pair = replace(pair, A_is_fixed=not of_A and (pair.key in fixed or not pair.learns_A))
        indices = of_A | of_B if pair.learns_A else of_B
        # One optimizer must step A and B together, or E would mix two moments.
        if len(indices) > 1:
            assignment.spread.append(pair)
        elif of_B and (of_A or not pair.learns_A):
            assignment.pairs[indices.pop()].append(pair)
        elif pair.B.requires_grad:
            assignment.orphans.append(pair)
    return assignment
