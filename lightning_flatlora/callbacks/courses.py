"""The way of each optimizer through a fit: the pairs that it learns, its steps, and the perturbation of its pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lightning_flatlora.pairs import LoRAPair
from lightning_flatlora.perturbation import Perturbation


@dataclass
class Course:
    """One optimizer's way through a fit.

    Attributes:
        index: the optimizer's place in ``trainer.optimizers``.
        step: steps that it has taken, from 0; steps that a loss scaler skipped count.
        initial_lr: of the parameter group that a schedule follows, once it is known.
        pairs: those whose factors it holds.
        perturbation: of their B, for the methods that keep one; it stays after the end, for checkpoints.
        awaited: a perturbation's state from a checkpoint, until there are pairs that it belongs to.
    """

    index: int
    step: int = 0
    initial_lr: float | None = None
    pairs: list[LoRAPair] = field(default_factory=list)
    perturbation: Perturbation | None = None
    awaited: dict[str, Any] | None = None

    def state_dict(self, with_perturbation: bool) -> dict[str, Any]:
        """What a resumed run needs of it."""
        state: dict[str, Any] = {"step": self.step, "initial_lr": self.initial_lr}
        if with_perturbation and self.perturbation is not None:
            state["perturbation"] = self.perturbation.state_dict()
        elif with_perturbation and self.awaited is not None:
            state["perturbation"] = self.awaited
        return state

    def load_state_dict(self, state: dict[str, Any], resting: Sequence[str]) -> None:
        """Take a :meth:`state_dict` over.

        Args:
            state: its perturbation may be of pairs that are not trained yet.
            resting: the names of such pairs.

        Raises:
            ValueError: the state is of other pairs.
        """
        self.step, self.initial_lr = state["step"], state["initial_lr"]
        saved = state.get("perturbation")
        if saved is not None and self.perturbation is not None:
            self.perturbation.load_state_dict(saved, resting)
        else:
            self.awaited = saved


class Owners(NamedTuple):
    """Which optimizer learns which pair.

    Attributes:
        pairs: for each optimizer those whose trained factors it holds.
        orphans: pairs with a trained B of which a trained factor is in no optimizer, and none is in several.
        spread: pairs whose factors are in several optimizers.
        places: the optimizers that the spread ones are in, as indices.
    """

    pairs: list[list[LoRAPair]]
    orphans: list[LoRAPair]
    spread: list[LoRAPair]
    places: list[int]


def owners_of(pairs: Sequence[LoRAPair], optimizers: Sequence[Optimizer]) -> Owners:
    """Tell for each pair which optimizer learns it."""
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
    owners = Owners([[] for _ in optimizers], [], [], [])
    for pair in pairs:
        trained = [pair.A, pair.B] if pair.learns_A else [pair.B]
        where = [[i for i, ids in enumerate(held) if id(factor) in ids] for factor in trained]
        places = sorted({i for each in where for i in each})
        if len(places) > 1:
            owners.spread.append(pair)
            owners.places.extend(places)
        elif [] in where:
            if pair.B.requires_grad:
                owners.orphans.append(pair)
        else:
            owners.pairs[places[0]].append(pair)
    return owners
