"""Pairs grouped by the optimizer that trains them, each group with a step count and a perturbation of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_flatlora.callbacks.methods.gradients import has_gradient, parameters_of
from lightning_flatlora.deepspeed_engine import EngineLayout, is_engine
from lightning_flatlora.distributed import layout_of
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation


@dataclass
class PairGroup:
    """The pairs that one optimizer trains, and where it is in the fit.

    Attributes:
        index: the optimizer's place in ``trainer.optimizers``.
        step: optimizer steps taken so far, from 0; steps that a loss scaler skipped count.
        initial_lr: of the parameter group that a schedule follows, once it is known.
        pairs: those whose factors the optimizer holds.
        perturbation: of their B, for the methods that keep one. It stays after the fit, for checkpoints.
        awaited: the state of a perturbation from a checkpoint, until there are pairs that it belongs to.
        steps_without_gradient: of the fit so far, in which no pair had one; None once a pair had one.
    """

    index: int
    step: int = 0
    initial_lr: float | None = None
    pairs: list[LoRAPair] = field(default_factory=list)
    perturbation: Perturbation | None = None
    awaited: dict[str, Any] | None = None
    steps_without_gradient: int | None = 0

    def install(self, estimator: Estimator, norm_scope: NormScope, model: nn.Module | None) -> None:
        """Give the pairs of a model, as it is wrapped, a perturbation, or let theirs follow what changed about them."""
        if not self.pairs:
            self.uninstall()
            self.perturbation = None
            return
        layout = EngineLayout() if is_engine(model) else layout_of(model)
        if self.perturbation is not None:
            self.perturbation.follow(self.pairs, layout)
            return
        self.perturbation = Perturbation(self.pairs, estimator, norm_scope, layout)
        self.perturbation.install()
        if self.awaited is not None:
            # These pairs were frozen when the checkpoint was loaded, so their state has waited until now.
            self.perturbation.load_state_dict(self.awaited, self.awaited["E"], may_be_new=True)
            self.awaited = None

    def uninstall(self) -> None:
        """Give the pairs' readers their own classes back; the perturbation stays for checkpoints."""
        if self.perturbation is not None:
            self.perturbation.uninstall()

    def look_for_gradients(self, is_sharded: bool) -> None:
        """Count a step in which no pair has a gradient, until one has."""
        if self.steps_without_gradient is None:
            return
        trained = [pair.B for pair in self.pairs if pair.B.requires_grad]
        # Where all pairs are frozen, nobody expects one.
        if not trained:
            return
        if self.perturbation is not None:
            has_gradient = self.perturbation.has_gradient
        else:
            # A rank that holds no part of a parameter can't know of its gradient.
            has_gradient = is_sharded or any(B.grad is not None for B in trained)
        self.steps_without_gradient = None if has_gradient else self.steps_without_gradient + 1

    @property
    def averaged(self) -> Perturbation | None:
        """The perturbation, where its pairs have an average and are trained now."""
        perturbation = self.perturbation
        if perturbation is None or not (perturbation.may_be_nonzero and perturbation.learns):
            return None
        return perturbation

    def average(
        self, optimizer: Optimizer, rho: float | None, beta: float, also_finite: Iterable[nn.Parameter]
    ) -> None:
        """Move Ê by the gradient that the optimizer is about to use, which was taken at B + Ê.

        Args:
            optimizer: the pairs'.
            rho: radius of the ball; None where this step leaves Ê as it is.
            beta: weight of the fresh E.
            also_finite: where a gradient of these is not finite a scaler skips the step, and Ê must not move either.
        """
        perturbation = self.perturbation
        if perturbation is None:
            return
        pairs_have_gradients = perturbation.has_gradient
        # Where no parameter has a gradient all batches were skipped, and the pairs did not miss anything.
        if pairs_have_gradients or has_gradient(optimizer):
            perturbation.forget_missing()
        if pairs_have_gradients and rho is not None:
            perturbation.average(perturbation.ascend(rho, at_perturbed=True, also_finite=also_finite), beta)

    def state_dict(self, with_perturbation: bool) -> dict[str, Any]:
        """What a resumed run needs."""
        state: dict[str, Any] = {"step": self.step, "initial_lr": self.initial_lr}
        if with_perturbation and self.perturbation is not None:
            state["perturbation"] = self.perturbation.state_dict()
        elif with_perturbation and self.awaited is not None:
            state["perturbation"] = self.awaited
        return state

    def load_state_dict(self, state: dict[str, Any], resting: Sequence[str]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: may hold the perturbation of pairs that are not trained yet.
            resting: the names of such pairs.

        Raises:
            ValueError: the state belongs to other pairs.
        """
        saved = state.get("perturbation")
        if saved is not None and self.perturbation is not None:
            self.perturbation.load_state_dict(saved, resting)
        else:
            # Its pairs are frozen or not there yet. When they come, the new perturbation starts from this state.
            self.awaited = saved
        # Last, so that a state that is refused changes nothing.
        self.step, self.initial_lr = state["step"], state["initial_lr"]


class PairAssignment(NamedTuple):
    """Which optimizer trains which pair.

    Attributes:
        pairs: for each optimizer, the pairs whose trained factors it holds.
        orphans: pairs with a trained B that have a trained factor in no optimizer, and none in several.
        spread: pairs whose factors are in several optimizers.
        places: the indices of the optimizers that hold the spread pairs.
    """

    pairs: list[list[LoRAPair]]
    orphans: list[LoRAPair]
    spread: list[LoRAPair]
    places: list[int]


def assign_pairs(pairs: Sequence[LoRAPair], optimizers: Sequence[Optimizer]) -> PairAssignment:
    """Find the optimizer that trains each pair."""
    assignment = PairAssignment([[] for _ in optimizers], [], [], [])
    held = []
    for optimizer in optimizers:
        held.append({id(parameter) for parameter in parameters_of(optimizer)})
    for pair in pairs:
        trained = [pair.A, pair.B] if pair.learns_A else [pair.B]
        places: set[int] = set()
        is_complete = True
        for factor in trained:
            holders = [index for index, identities in enumerate(held) if id(factor) in identities]
            places.update(holders)
            is_complete = is_complete and bool(holders)
        # One optimizer must step A and B together, or E would belong to two different moments.
        if len(places) > 1:
            assignment.spread.append(pair)
            assignment.places.extend(sorted(places))
        elif is_complete:
            assignment.pairs[places.pop()].append(pair)
        # A frozen B waits until it is unfrozen and given to an optimizer. A trained one in none is a mistake.
        elif pair.B.requires_grad:
            assignment.orphans.append(pair)
    return assignment
