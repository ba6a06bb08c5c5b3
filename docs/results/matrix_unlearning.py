"""Column B of protocol_matrix.md: unlearning with and without a perturbation of the forget term, and relearning."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from matrix_facts import (  # beside this file
    PEOPLE,
    TOWNS,
    Knowledge,
    batches,
    known,
    log_likelihoods,
    trained,
    with_adapter,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.full_weight.weight_noise import derived_seed
from lightning_flatlora.loops import FMLoRA
from recipes.studies.rows import Row

LORA, FMLORA, RANDOM = "LoRA", "FMLoRA", "RandomPerturbation"
STRENGTHS: dict[str, list[float]] = {LORA: [], FMLORA: [0.06, 0.25, 1, 4], RANDOM: [0.03, 0.1, 0.3, 1]}
"""Of each arm, in order: rho or sigma."""
SPACE: dict[str, list[Any]] = {
    "rate": [3e-4, 1e-3, 3e-3],
    "steps": [25, 50, 100],
    "beta": [0.1, 0.5],
    "retain": [1, 3, 10],
    "rank": [2, 8, 32],
    "optimizer": ["adamw", "sign"],
    "averaging": [0.0, 0.9],
}
SHOWN, RETAINED = 30, 90
ATTACK_RATE, ATTACK_RANK, ATTACKS = 1e-3, 8, (5, 10, 30)
OTHER_RATES = [3e-4, 3e-3]
"""Of the attack, on some final seeds: an arm may help against one rate only."""


class Run(NamedTuple):
    """One unlearning and the attack on it.

    Attributes:
        arm: a key of :data:`STRENGTHS`.
        settings: a value of each key of :data:`SPACE`.
        strength: of the arm; None for LoRA.
        seed: of the facts that are forgotten, the adapters' starts, the order of the batches and the noise.
        stage: "search" or "final".
    """

    arm: str
    settings: Mapping[str, Any]
    strength: float | None
    seed: int
    stage: str = "search"

    @property
    def name(self) -> str:
        """A name that no other run has."""
        return json.dumps([self.arm, self.settings, self.strength, self.seed], sort_keys=True)

    def key(self) -> Row:
        """Return the first entries of its row."""
        return self._asdict()

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.stage}: {self.arm} {self.strength or ''} with {values}, seed {self.seed}"


class Parts(NamedTuple):
    """Numbers of the facts.

    Attributes:
        forgotten: are unlearned.
        shown: those of them that the attacker has.
        hidden: the others of them; their recall is measured.
        retained: are in the retain loss.
        kept: are in no loss; their recall is the utility.
    """

    forgotten: list[int]
    shown: list[int]
    hidden: list[int]
    retained: list[int]
    kept: list[int]


def parts_of(seed: int) -> Parts:
    """Divide the facts: one town's are forgotten, and each four seeds in a row take all four towns."""
    chosen = random.Random(seed)
    town = seed % len(TOWNS)
    forgotten = list(range(town, PEOPLE, len(TOWNS)))
    rest = [number for number in range(PEOPLE) if number % len(TOWNS) != town]
    chosen.shuffle(forgotten)
    chosen.shuffle(rest)
    return Parts(forgotten, forgotten[:SHOWN], forgotten[SHOWN:], rest[:RETAINED], rest[RETAINED:])


def npo(net: Any, knowledge: Knowledge, numbers: Sequence[int], beta: float) -> Tensor:
    """Return the loss of negative preference optimization (Zhang et al., arXiv 2404.05868, Eq. 3).

    Args:
        net: the model that unlearns.
        knowledge: with the reference model's log-likelihoods.
        numbers: the facts of the batch.
        beta: with a small one, it is gradient ascent.
    """
    ratio = log_likelihoods(net, knowledge.texts.batch(numbers)) - knowledge.likelihoods[list(numbers)]
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


def unlearned(knowledge: Knowledge, run: Run) -> Any:
    """Unlearn by a new adapter: NPO on what is forgotten, and the answers' loss on what is retained."""
    parts, settings = parts_of(run.seed), run.settings
    net = with_adapter(knowledge.model, settings["rank"], run.seed)
    optimizer = optimizer_of(net, settings)
    passes = forget_passes(net, optimizer, run)
    forget, retain = batches(parts.forgotten, run.seed), batches(parts.retained, run.seed)
    averages = [parameter.detach().clone() for parameter in trained(net)]
    for step in range(settings["steps"]):
        numbers = next(forget)
        for each_pass in passes(step):
            with each_pass:
                npo(net, knowledge, numbers, settings["beta"]).backward()
        loss = -log_likelihoods(net, knowledge.texts.batch(next(retain))).mean()
        (settings["retain"] * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        for average, parameter in zip(averages, trained(net), strict=True):
            average.lerp_(parameter.detach(), 1 - settings["averaging"])
    for average, parameter in zip(averages, trained(net), strict=True):
        parameter.data.copy_(average)
    return net


def optimizer_of(net: nn.Module, settings: Any) -> Optimizer:
    """Return AdamW, or sign descent: Adam that remembers nothing."""
    memory = {"betas": (0.0, 0.0), "eps": 1e-12} if settings["optimizer"] == "sign" else {}
    return torch.optim.AdamW(trained(net), lr=settings["rate"], weight_decay=0.0, **memory)


def forget_passes(net: nn.Module, optimizer: Optimizer, run: Run) -> Callable[[int], Iterator[Any]]:
    """Return a function that yields, for a step, the passes over the forget loss."""
    if run.arm == FMLORA:
        flat = FMLoRA(net, optimizer, rho=run.strength)
        return lambda step: flat.training_passes()
    if run.arm == RANDOM:
        noise, sigma = WeightNoise(net), run.strength or 0.0
        return lambda step: iter([noise.applied(sigma, derived_seed(run.seed, step))])
    return lambda step: iter([nullcontext()])


def attacked(knowledge: Knowledge, model: Any, seed: int, rate: float = ATTACK_RATE) -> Row:
    """Train an adapter on what is shown.

    Args:
        knowledge: with the facts.
        model: the one that has unlearned, without an adapter; it stays as it is.
        seed: of the parts.
        rate: of the attack.

    Returns:
        After each number of steps the ``recall`` of what is hidden, and its mean log-likelihood in nats; at the end the
        recall of what is ``shown``, without which the attack would have failed.
    """
    parts, texts = parts_of(seed), knowledge.texts
    own = derived_seed(seed, 1)  # or the attack would start with the A that was used to unlearn
    net = with_adapter(model, ATTACK_RANK, own)
    optimizer = torch.optim.AdamW(trained(net), lr=rate, weight_decay=0.0)
    order = batches(parts.shown, own)
    found = {"0": known(net, texts, parts.hidden)}  # a new adapter changes nothing
    for step in range(1, ATTACKS[-1] + 1):
        (-log_likelihoods(net, texts.batch(next(order))).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in ATTACKS:
            found[str(step)] = known(net, texts, parts.hidden)
    return {
        "recall": {steps: each.recall for steps, each in found.items()},
        "likelihood": {steps: each.likelihood for steps, each in found.items()},
        "shown": known(net, texts, parts.shown).recall,
    }
