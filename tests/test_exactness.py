"""The package equals the literal algorithms in float64, run for run: 100 AdamW steps, differences below 1e-10."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from float64_runs import BATCHES, BETA, RHO, Automatic, Manual, fit_in_float64, network, reference, worst_difference
from helpers import assert_no_trace, trainer_of, weights
from imitated_layers import KINDS, Learner, batches, error, model_of, optimizer_of
from reference import Reference
from torch import nn
from torch.utils.data import DataLoader

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA, InverseSqrtRho, LearningRateRho, LinearRho, find_pairs

CASES = [
    {},
    {"estimator": "projected"},
    {"norm_scope": "layer"},
    {"estimator": "projected", "norm_scope": "layer"},
    {"accumulate": 2},
    {"accumulate": 4},
    {"clip_norm": 0.05},
    {"clip_value": 0.01},
    {"accumulate": 4, "clip_norm": 0.05, "norm_scope": "layer"},
    {"start_step": 7, "every_n_steps": 3},
]


@cache
def literal(number: int, beta: float | None, rho: float) -> nn.Module:
    return reference(epochs_of(CASES[number]), **CASES[number], beta=beta, rho=lambda step: rho)


def epochs_of(case: dict[str, Any]) -> int:
    return -(-100 // -(-BATCHES // case.get("accumulate", 1)))


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_100_steps_equal_the_literal_algorithm(front_end: str, number: int) -> None:
    case = CASES[number]
    epochs, accumulate = epochs_of(case), case.get("accumulate", 1)
    method = {
        key: value for key, value in case.items() if key in ("estimator", "norm_scope", "start_step", "every_n_steps")
    }
    clip = {}
    if "clip_norm" in case or "clip_value" in case:
        kind = "norm" if "clip_norm" in case else "value"
        clip = {"gradient_clip_val": case[f"clip_{kind}"], "gradient_clip_algorithm": kind}
    net = network()
    if front_end == "FMLoRAModule":
        fit_in_float64(Manual(net, rho=RHO, accumulate_grad_batches=accumulate, **method, **clip), epochs, [])
    else:
        callback = EFMLoRA(RHO, beta=BETA, **method) if front_end == "EFMLoRA" else FMLoRA(RHO, **method)
        fit_in_float64(Automatic(net), epochs, [callback], accumulate_grad_batches=accumulate, **clip)
    assert worst_difference(net, literal(number, BETA if front_end == "EFMLoRA" else None, RHO)) < 1e-10
    assert worst_difference(net, literal(number, None, 0.0)) > 1e-4


@pytest.mark.parametrize(
    ("schedule", "rho"),
    [
        (InverseSqrtRho(RHO), lambda step: RHO / (step + 1) ** 0.5),
        (LinearRho(0.0, RHO, total_steps=50), lambda step: RHO * min(step / 50, 1)),
        (CosineRho(RHO, 0.0), lambda step: RHO * (1 + math.cos(math.pi * step / 104)) / 2),
    ],
    ids=["inverse square root", "linear", "cosine"],
)
@pytest.mark.parametrize("kind", [EFMLoRA, FMLoRA])
def test_rho_schedules_equal_the_literal_algorithm(kind: Any, schedule: Any, rho: Any) -> None:
    net = network()
    fit_in_float64(Automatic(net), 4, [kind(schedule)])
    expected = reference(4, rho=rho, **({"beta": 0.9} if kind is EFMLoRA else {}))
    assert worst_difference(net, expected) < 1e-10


def test_rho_follows_the_learning_rate() -> None:
    net = network()
    fit_in_float64(Automatic(net), 4, [EFMLoRA(LearningRateRho(RHO), beta=BETA)])
    cosine = [(1 + math.cos(math.pi * step / 200)) / 2 for step in range(104)]
    expected = reference(4, beta=BETA, rho=lambda step: RHO * cosine[step])
    assert worst_difference(net, expected) < 1e-10


METHODS = {"EFMLoRA": (EFMLoRA, {"beta": BETA}), "FMLoRA": (FMLoRA, {})}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "finder", "name"), KINDS)
def test_layers_of_other_projects_equal_the_literal_algorithm(
    kind: type[nn.Module], finder: Any, name: str, method: str
) -> None:
    make, own = METHODS[method]
    expected, model = model_of(kind), model_of(kind)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(expected, finder=finder).pairs]
    run = Reference(expected, pairs, error, optimizer_of(expected), lambda step: RHO, beta=own.get("beta"))
    run.train(batches(4))
    trainer = trainer_of(None, [make(RHO, finder=finder, **own)], max_epochs=-1, max_steps=4, precision="64-true")
    trainer.fit(Learner(model), DataLoader(batches(8), batch_size=None))
    for key, value in weights(model).items():
        assert torch.allclose(value, weights(expected)[key], rtol=0, atol=1e-10), key
    assert_no_trace(model)
