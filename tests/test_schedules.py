"""rho over time: values at the ends and in between, and what is refused."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from lightning_flatlora import ConstantRho, CosineRho, InverseSqrtRho, LearningRateRho, LinearRho, RhoSchedule


def test_values() -> None:
    assert [ConstantRho(2.0)(t) for t in (0, 5)] == [2.0, 2.0]
    assert [LinearRho(1.0, 3.0)(t, horizon=4) for t in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert [round(CosineRho(2.0, 1.0)(t, horizon=2), 12) for t in range(4)] == [2.0, 1.5, 1.0, 1.0]
    assert [InverseSqrtRho(6.0)(t) for t in (0, 3, 8)] == [6.0, 3.0, 2.0]
    assert [LearningRateRho(2.0)(9, learning_rate=lr) for lr in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]


def test_total_steps_takes_the_place_of_the_runs_length() -> None:
    assert LinearRho(1.0, 3.0, total_steps=4)(2, horizon=100) == 2.0
    assert LinearRho(1.0, 3.0, total_steps=4)(2, horizon=math.inf) == 2.0


@pytest.mark.parametrize("kind", [ConstantRho, InverseSqrtRho, LearningRateRho])
@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "1", True, None])
def test_bad_radius_is_refused(kind: type[RhoSchedule], bad: object) -> None:
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got"):
        kind(bad)  # type: ignore[call-arg]


def test_all_bad_values_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"start must be .* got -1; end must be .* got nan; total_steps must be .* 0"):
        CosineRho(-1, float("nan"), total_steps=0)


def test_a_schedule_of_ones_own() -> None:
    class Every(RhoSchedule):
        def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
            return float(step % 2)

    assert Every()(3) == 1.0
    assert not Every.needs_horizon


def test_a_dataclass_of_ones_own_may_hold_what_is_no_radius() -> None:
    @dataclass
    class Milestones(RhoSchedule):
        rho: float
        milestones: list[int]
        mode: str = "up"
        offset: float = -3.0

        def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
            return self.rho * sum(step >= milestone for milestone in self.milestones)

    schedule = Milestones(0.5, [3, 5])
    assert [schedule(step) for step in (2, 3, 5)] == [0.0, 0.5, 1.0]


def test_numbers_of_numpy_are_numbers() -> None:
    assert ConstantRho(np.float32(0.5))(0) == 0.5  # type: ignore[arg-type]
    assert LinearRho(np.int64(1), 0.0, total_steps=np.int64(4))(2) == 0.5  # type: ignore[arg-type]
