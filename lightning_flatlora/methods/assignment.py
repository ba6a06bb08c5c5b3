"""Which optimizer trains which pair."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch.optim import Optimizer

from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.pairs.lora_pair import LoRAPair, PairSearch


class PairAssignment(NamedTuple):
    """Which optimizer trains which pair.

    Attributes:
        pairs: for each optimizer, the pairs whose B it holds, untrained ones last.
        orphans: pairs with a trained B that is in no optimizer.
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
        of_A = {index for index, identities in enumerate(held) if id(pair.A) in identities}
        of_B = {index for index, identities in enumerate(held) if id(pair.B) in identities}
        # One optimizer must step A and B together, or E would mix two moments.
        if len(of_B | of_A if pair.learns_A else of_B) > 1:
            assignment.spread.append(pair)
        elif of_B:
            # With LoRA-FA, peft lets A require a gradient again, such as after a pass without the adapter.
            assignment.pairs[of_B.pop()].append(replace(pair, A_is_fixed=not of_A))
        elif pair.B.requires_grad:
            assignment.orphans.append(pair)
    return assignment
