"""Which optimizer trains which pair."""

from collections.abc import Sequence
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


def assign_pairs(search: PairSearch, optimizers: Sequence[Optimizer]) -> PairAssignment:
    """Find the optimizer of each pair, even of pairs that are unfrozen or activated only later."""
    assignment = PairAssignment([[] for _ in optimizers], [], [])
    held = [set(map(id, parameters_of(optimizer))) for optimizer in optimizers]
    for pair in (*search.pairs, *search.resting):
        # E involves a division by the scaling.
        if pair.scaling == 0:
            continue
        holders = []
        for factor in [pair.A, pair.B] if pair.learns_A else [pair.B]:
            holders.append({index for index, identities in enumerate(held) if id(factor) in identities})
        indices = set().union(*holders)
        # One optimizer must step A and B together, or E would mix two moments.
        if len(indices) > 1:
            assignment.spread.append(pair)
        elif all(holders):
            assignment.pairs[indices.pop()].append(pair)
        elif pair.B.requires_grad:
            assignment.orphans.append(pair)
    return assignment
