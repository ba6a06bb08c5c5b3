"""The rules of a step, below all front ends: when a perturbation is taken, its size, what is counted and kept."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from perturbation_models import backward, model_and_pairs
from torch import nn

from lightning_flatlora import CosineRho, LearningRateRho, LinearRho
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep, FMLoRAStep
from lightning_flatlora.methods.step_method import STEPS_UNTIL_WARNING

KINDS = [EFMLoRAStep, FMLoRAStep]
kinds = pytest.mark.parametrize("kind", KINDS)


def started(method: Any, pairs: Any = None, model: Any = None) -> tuple[Any, nn.Module]:
    """Give a method a small model's pairs and their optimizer."""
    if model is None:
        model, found = model_and_pairs()
        pairs = found if pairs is None else pairs
    method.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.take_pairs(pairs, model, model)
    method.install()
    return method, model


def E_of(method: Any) -> dict[str, Any]:
    return method.perturbation.state_dict()["E"]


def same_E(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(E, right[name]) for name, E in left.items())


# -- when, and how large


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"every_n_steps": 2}, [0, 2, 4]),
        ({"start_step": 3}, [3, 4, 5]),
        ({"start_step": 1, "every_n_steps": 3}, [1, 4]),
    ],
)
@kinds
def test_steps_that_take_a_fresh_perturbation(kind: Any, settings: dict[str, int], steps: list[int]) -> None:
    """Counted from start_step. Only these steps have FMLoRA's two passes, or move EFMLoRA's average."""
    method, model = started(kind(0.5, **settings))
    found = []
    for step in range(6):
        backward(model, seed=step)
        before = E_of(method)
        if method.refreshes:
            found.append(step)
        if kind is FMLoRAStep:
            assert method.takes_ascent is method.refreshes
        method.before_step()
        if kind is EFMLoRAStep:
            assert same_E(before, E_of(method)) is (step not in steps)
            assert method.perturbs is (step >= steps[0])
    assert found == steps
    assert method.step == 6


def test_rho_of_the_step_and_of_the_horizon() -> None:
    method, _ = started(FMLoRAStep(LinearRho(1.0, 0.0)))
    assert method.lacks_horizon
    method.horizon = 4
    found = []
    for _ in range(6):
        found.append(method.current_rho)
        method.before_step()
    assert found == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert not method.takes_ascent
    assert not FMLoRAStep(CosineRho(1.0, 0.0, total_steps=3)).lacks_horizon


@pytest.mark.parametrize(
    ("initial", "rates", "expected"),
    [
        ({}, [0.1, 0.05, 0.2], [1.0, 0.5, 2.0]),
        ({"initial_lr": 0.2}, [0.1, 0.2], [0.5, 1.0]),
        # A hand-written warm-up may start at 0.
        ({}, [0.0, 0.1, 0.05], [0.0, 1.0, 0.5]),
    ],
)
@kinds
def test_rho_follows_the_rate_of_the_group_that_holds_the_pairs(
    kind: Any, initial: dict[str, float], rates: list[float], expected: list[float]
) -> None:
    method, _ = started(kind(LearningRateRho(1.0)))
    (group,) = method.optimizer.param_groups
    method.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 9.0})
    group.update(initial)
    found = []
    for rate in rates:
        group["lr"] = rate
        found.append(method.current_rho)
    assert found == pytest.approx(expected)
    assert not method.rate_problems()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            lambda pairs: [{"params": [p.A, p.B], "lr": 0.1 + i} for i, p in enumerate(pairs)],
            "several parameter groups",
        ),
        (lambda pairs: [{"params": [p.B for p in pairs], "lr": torch.tensor(0.1)}], "a tensor here"),
    ],
)
def test_rates_that_rho_can_not_follow(groups: Any, message: str) -> None:
    method, _ = started(EFMLoRAStep(LearningRateRho(1.0)))
    method.optimizer.param_groups = groups(method.pairs)
    (problem,) = method.pair_problems()
    assert message in problem


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@kinds
def test_a_schedule_that_gives_no_radius_stops_the_run(kind: Any, value: float) -> None:
    class Falling(LinearRho):
        def __call__(self, step: int, horizon: float, *more: Any) -> float:
            return value if step == 2 else 1.0

    method, _ = started(kind(Falling(1.0, 0.0)))
    method.before_step()
    method.before_step()
    with pytest.raises(MisconfigurationException, match=rf"a finite number >= 0, got {value} at step 2"):
        _ = method.current_rho


# -- gradients


def test_a_step_without_any_gradient_leaves_the_average() -> None:
    method, model = started(EFMLoRAStep(0.5))
    backward(model)
    method.before_step()
    before = E_of(method)
    model.zero_grad()
    method.before_step()
    assert same_E(before, E_of(method))
    assert method.step == 2


def test_frozen_pairs_take_no_second_pass() -> None:
    method, _ = started(FMLoRAStep(0.5))
    assert method.takes_ascent
    for pair in method.pairs:
        pair.B.requires_grad_(False)
    assert method.refreshes
    assert not method.takes_ascent
    assert method.ascent_parameters == []


def test_a_zero_rho_lets_the_average_decay_next_to_a_module() -> None:
    """A refresh step with rho = 0 moves it towards zero; before there is an average, it is a plain step."""
    method, model = started(EFMLoRAStep(LinearRho(1.0, 0.0, total_steps=1), beta=0.5))
    method.schedules_module = True
    sizes = []
    for _ in range(3):
        backward(model)
        assert method.takes_ascent
        with method.perturb():
            pass
        method.before_step()
        sizes.append(sum(float(E.norm()) for E in E_of(method).values()))
    assert sizes == pytest.approx([sizes[0], sizes[0] / 2, sizes[0] / 4])
    zero, _ = started(EFMLoRAStep(0.0))
    zero.schedules_module = True
    assert not zero.takes_ascent


def test_pairs_that_never_have_a_gradient_are_said_after_some_steps() -> None:
    method, _ = started(EFMLoRAStep(0.5))
    for _ in range(STEPS_UNTIL_WARNING - 1):
        method.before_step()
    with pytest.warns(UserWarning, match="EFMLoRA: no pair's B has had a gradient so far"):
        method.before_step()
