"""Run for run, each baseline equals its literal loop in float64: 52 or more AdamW steps, differences below 1e-10."""

import math
from itertools import product
from typing import Any

import pytest
from dense import Dense, DenseBAR, DenseBiLoRA, DenseFlatLoRA, DenseLoRASAM, DenseOBAR, DenseSAM, plain_network
from float64_runs import Automatic, fit_in_float64, network, worst_difference
from helpers import BASELINES, SIZES

from lightning_flatlora import CosineRho, LearningRateRho, LinearRho
from lightning_flatlora.baselines import SAM, LoRASAM

LITERAL: dict[str, Any] = {
    "SAM": DenseSAM,
    "LoRASAM": DenseLoRASAM,
    "nBAR": DenseBAR,
    "oBAR": DenseOBAR,
    "RandomPerturbation": DenseFlatLoRA,
    "BiLoRA": DenseBiLoRA,
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", BASELINES)
def test_equals_the_literal_loop(name: str, accumulate: int) -> None:
    size, epochs, net = SIZES[name], {1: 2, 4: 8}[accumulate], network()
    fit_in_float64(Automatic(net), epochs, [BASELINES[name](size)], accumulate_grad_batches=accumulate)
    loop = LITERAL[name](lambda step: size)
    assert worst_difference(net, loop.run(epochs, accumulate)) < 1e-10
    assert loop.step >= 50
    assert worst_difference(net, Dense(lambda step: 0.0).run(epochs, accumulate)) > 1e-5


def test_sam_needs_no_adapter() -> None:
    """Full fine-tuning, the reference ceiling."""
    net = plain_network()
    fit_in_float64(Automatic(net), 2, [SAM(0.4)])
    assert worst_difference(net, DenseSAM(lambda step: 0.4, plain_network()).run(2)) < 1e-10


SCHEDULES: dict[str, Any] = {
    "decreasing": (lambda size: LinearRho(size, 0.0), lambda step: 1 - step / 52),
    "increasing": (
        lambda size: CosineRho(0.0, size, total_steps=40),
        lambda step: (1 - math.cos(math.pi * min(step / 40, 1))) / 2,
    ),
    "with the learning rate": (LearningRateRho, lambda step: (1 + math.cos(math.pi * step / 200)) / 2),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*product(BASELINES, ["decreasing"]), *product(["LoRASAM", "nBAR"], [*SCHEDULES][1:])]
)
def test_schedules_equal_the_literal_loop(name: str, kind: str) -> None:
    schedule, factor = SCHEDULES[kind]
    size, net = SIZES[name], network()
    fit_in_float64(Automatic(net), 2, [BASELINES[name](schedule(size))])
    assert worst_difference(net, LITERAL[name](lambda step: size * factor(step)).run(2)) < 1e-10


def test_ascents_every_third_step_from_the_seventh() -> None:
    net = network()
    fit_in_float64(Automatic(net), 2, [LoRASAM(0.4, start_step=7, every_n_steps=3)])
    loop = DenseLoRASAM(lambda step: 0.4 if step >= 7 and (step - 7) % 3 == 0 else 0.0)
    assert worst_difference(net, loop.run(2)) < 1e-10
