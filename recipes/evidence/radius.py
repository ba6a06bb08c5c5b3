"""A radius that needs no search: rules that set rho in each step, and other directions for E. EFMLoRA in all else."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora import CosineRho, EFMLoRA, InverseSqrtRho
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.distributed import Layout
from lightning_flatlora.lora_pair import LoRAPair
from lightning_flatlora.pair_stacks import stackable
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation

CAP = 32.0
"""The largest radius of a loss budget, which W1's search has chosen: gradients vanish where LoRA overfits."""

_MEMORY = 0.9  # weight of the past in the mean direction that batch noise is taken from

Rule = Callable[[Perturbation, float, float], float]
"""The radius of a step, from the perturbation, whose pairs hold the step's gradients, the share of the run done, and
the loss of the step's batch in nats."""


class RuledEFMLoRA(EFMLoRA):
    """EFMLoRA whose radius a rule sets from the step's gradients or weights; for one process on a CPU.

    Args:
        rule: gives the radius.
    """

    def __init__(self, rule: Rule) -> None:
        # A schedule that knows the horizon, for the share of the run.
        super().__init__(CosineRho(1.0, 0.0))
        self.rule = rule
        self.loss = 0.0  # of the step's batch, with the weights perturbed as they are in training, in nats

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self.loss = float(loss.detach())

    @override
    def current_size(self, trainer: Trainer, pair_group: PairGroup | None = None) -> float:
        group = pair_group or self.main_group
        assert group.perturbation is not None
        return self.rule(group.perturbation, group.step / self._horizon, self.loss)


class BatchNoiseEFMLoRA(EFMLoRA):
    """EFMLoRA along the fresh ascent less its mean over past steps: what is the batch's own (arXiv 2403.12350)."""

    @override
    def begin(self) -> None:
        super().begin()
        self._means: list[Tensor] = []

    @override
    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, pair_group: PairGroup) -> None:
        perturbation = pair_group.perturbation
        assert perturbation is not None
        fresh = perturbation.ascend(self.current_size(trainer, pair_group), at_perturbed=True)
        if not self._means:
            self._means = [torch.zeros_like(E) for E in fresh.stacks]
        noise = []
        for mean, E in zip(self._means, fresh.stacks, strict=True):
            mean.lerp_(E, 1 - _MEMORY)
            noise.append(E - mean)
        # To the length of the fresh one, which is the radius. A gradient that is all mean has no noise.
        length = perturbation_norm(perturbation, noise)
        factor = perturbation_norm(perturbation, fresh.stacks) / length if length > 0 else 0.0
        scaled = [E * factor for E in noise]
        perturbation.average(FreshPerturbation(scaled, fresh.finite, fresh.is_zero), self.beta)


class HeadEFMLoRA(EFMLoRA):
    """EFMLoRA with the head's weight inside the ball, split so that the loss rises most to first order.

    With the slopes p along the pairs' unit perturbation and h = ||dL/dW|| along the head's, the pairs get the radius
    rho p / sqrt(p^2 + h^2) and the head rho h / sqrt(p^2 + h^2). For one process on a CPU, and a module whose head is a
    linear layer called ``head``.
    """

    @override
    def begin(self) -> None:
        super().begin()
        self._E: Tensor | None = None  # of the head's weight, as the average over past steps
        self._is_on = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        assert isinstance(pl_module.head, nn.Linear)
        self._head = pl_module.head
        self._patches.callback(self._head.register_forward_hook(self._add_perturbation).remove)

    def _add_perturbation(self, head: nn.Linear, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        if not self._is_on or self._E is None:
            return logits
        return logits + nn.functional.linear(inputs[0], self._E)

    @override
    def on(self, trainer: Trainer) -> None:
        super().on(trainer)
        self._is_on = True

    @override
    def off(self) -> None:
        super().off()
        self._is_on = False

    @override
    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, pair_group: PairGroup) -> None:
        perturbation, gradient = pair_group.perturbation, self._head.weight.grad
        assert perturbation is not None
        assert gradient is not None
        slope, head_slope = first_order_rise(perturbation), float(gradient.norm())
        whole = math.hypot(slope, head_slope)
        # Without a gradient no direction is steeper than another, and E is 0 whatever its radius.
        rate = self.current_size(trainer, pair_group) / whole if whole > 0 else 0.0
        fresh = rate * gradient  # its norm is rho h / whole
        self._E = fresh if self._E is None else self._E.lerp(fresh, self.beta)
        perturbation.average(perturbation.ascend(rate * slope, at_perturbed=True), self.beta)


def loss_budget(nats: float, cap: float = CAP, *, anneals: bool = False) -> Rule:
    """The radius at which the loss rises by so many nats to first order, as in LE-SAM (arXiv 2605.10183).

    Args:
        nats: the rise, > 0.
        cap: the largest radius.
        anneals: whether the budget falls to 0 along half a cosine wave over the run.
    """

    def radius(perturbation: Perturbation, share: float, loss: float) -> float:
        budget = nats * (1 + math.cos(math.pi * share)) / 2 if anneals else nats
        return _radius_of_rise(perturbation, budget, cap)

    return radius


def loss_share(part: float, cap: float = CAP) -> Rule:
    """The radius at which the loss rises by this part of itself to first order.

    Args:
        part: of the loss of the step's batch, > 0.
        cap: the largest radius.
    """

    def radius(perturbation: Perturbation, share: float, loss: float) -> float:
        return _radius_of_rise(perturbation, part * loss, cap)

    return radius


def _radius_of_rise(perturbation: Perturbation, nats: float, cap: float) -> float:
    rise = first_order_rise(perturbation)
    return min(cap, nats / rise) if rise > 0 else cap


def relative_to_update(factor: float) -> Rule:
    """The radius as a multiple of the norm of the adapter's whole update, over all pairs."""

    def radius(perturbation: Perturbation, share: float, loss: float) -> float:
        squares = sum(squared_update(pair, pair.B.detach()) for pair in perturbation.pairs)
        return factor * math.sqrt(float(squares))

    return radius


def first_order_rise(perturbation: Perturbation) -> float:
    """By how much the loss rises along the fresh E of radius 1, to first order: the sum of <dL/dB, E>, in nats."""
    unit = perturbation.ascend(1.0, at_perturbed=True)
    rise = 0.0
    for pair, E in by_pair(perturbation, unit.stacks):
        if pair.B.grad is not None:
            rise += float((pair.B.grad * E.view_as(pair.B)).sum())
    return rise


def perturbation_norm(perturbation: Perturbation, stacks: list[Tensor]) -> float:
    """The norm of s E A over all pairs, for E as stacks (L, n, r)."""
    squares = sum(squared_update(pair, E) for pair, E in by_pair(perturbation, stacks))
    return math.sqrt(float(squares))


def squared_update(pair: LoRAPair, B: Tensor) -> Tensor:
    """``||s B A||_F^2`` for a pair's A and any B (n, r), without the (n, m) product."""
    A = pair.A.detach()
    return pair.scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum()


def by_pair(perturbation: Perturbation, stacks: list[Tensor]) -> Iterator[tuple[LoRAPair, Tensor]]:
    """Each pair with its own (n, r) of tensors that are stacked as the perturbation's are."""
    groups = stackable(perturbation.pairs, Layout())
    for group, stack in zip(groups, stacks, strict=True):
        yield from zip(group, stack, strict=True)


@dataclass(frozen=True)
class RadiusRule:
    """A way to set the radius, and what is tried of it.

    Attributes:
        title: what the report calls it.
        build: makes the callback from a configuration, which also holds the number of ``steps``.
        name: of its one setting.
        values: of this setting that are tried.
    """

    title: str
    build: Callable[[Mapping[str, Any]], EFMLoRA]
    name: str
    values: tuple[float, ...]

    def callbacks(self, **config: Any) -> list[EFMLoRA]:
        """New callbacks for a Trainer, as :meth:`recipes.shared.methods.Method.callbacks` gives them."""
        return [self.build(config)]


RULES: dict[str, RadiusRule] = {
    "budget": RadiusRule(
        f"loss budget in nats, cap {CAP:g}", lambda c: RuledEFMLoRA(loss_budget(c["nats"])), "nats", (0.05, 0.2, 0.8)
    ),
    "budget_annealed": RadiusRule(
        "the same, annealed to 0",
        lambda c: RuledEFMLoRA(loss_budget(c["nats"], anneals=True)),
        "nats",
        (0.2, 0.8),
    ),
    "budget_of_loss": RadiusRule(
        f"loss budget as a part of the loss, cap {CAP:g}",
        lambda c: RuledEFMLoRA(loss_share(c["part"])),
        "part",
        (0.03, 0.1, 0.3),
    ),
    "relative": RadiusRule(
        "relative to the update's norm",
        lambda c: RuledEFMLoRA(relative_to_update(c["factor"])),
        "factor",
        (0.3, 1.0, 3.0),
    ),
    "cosine": RadiusRule(
        "rho falls to 0 along a cosine", lambda c: EFMLoRA(CosineRho(c["start"], 0.0)), "start", (32.0, 128.0)
    ),
    "inverse_sqrt": RadiusRule(
        "rho / sqrt(step + 1)", lambda c: EFMLoRA(InverseSqrtRho(c["first"])), "first", (128.0, 512.0)
    ),
    "late": RadiusRule(
        "rho in the second half only",
        lambda c: EFMLoRA(c["late_rho"], start_step=c["steps"] // 2),
        "late_rho",
        (32.0, 128.0),
    ),
}
"""Rules for the radius, each with fixed values that are the same in every workload."""

DIRECTIONS: dict[str, RadiusRule] = {
    "beta": RadiusRule("another beta", lambda c: EFMLoRA(c["rho"], beta=c["beta"]), "beta", (0.1, 0.5, 1.0)),
    "batch_noise": RadiusRule(
        "fresh less mean, at rho times", lambda c: BatchNoiseEFMLoRA(c["rho"] * c["times"]), "times", (1.0,)
    ),
    "head": RadiusRule(
        "the head inside the ball, at rho times", lambda c: HeadEFMLoRA(c["rho"] * c["times"]), "times", (1.0, 2.0)
    ),
}
"""Other directions for E, at the rho that EFMLoRA's search has chosen; "head" perturbs more than the pairs."""
