"""Values out of range are refused where they are given, all of them in one message."""

import math
import re
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA, FMLoRAModule, LearningRateRho, LinearRho

BAD_VALUES = [
    ("rho", -1, r"rho must be a finite number >= 0 or a RhoSchedule, got -1"),
    ("rho", math.nan, r"rho must be a finite number >= 0 or a RhoSchedule, got nan"),
    ("rho", math.inf, r"rho must be a finite number >= 0 or a RhoSchedule, got inf"),
    ("rho", "2", r"rho must be a finite number >= 0 or a RhoSchedule, got '2'"),
    ("rho", None, r"rho must be a finite number >= 0 or a RhoSchedule, got None"),
    ("rho", True, r"rho must be a finite number >= 0 or a RhoSchedule, got True"),
    ("estimator", "mean", r"estimator must be 'average' or 'projected', got 'mean'"),
    ("estimator", None, r"estimator must be 'average' or 'projected', got None"),
    ("norm_scope", "all", r"norm_scope must be 'global' or 'layer', got 'all'"),
    ("start_step", -1, r"start_step must be an integer >= 0, got -1"),
    ("start_step", 1.5, r"start_step must be an integer >= 0, got 1.5"),
    ("every_n_steps", 0, r"every_n_steps must be an integer >= 1, got 0"),
    ("every_n_steps", "2", r"every_n_steps must be an integer >= 1, got '2'"),
    ("every_n_steps", True, r"every_n_steps must be an integer >= 1, got True"),
    ("adapter_name", 3, r"adapter_name must be the name of an adapter or None for the active ones, got 3"),
]


BAD_BETAS = [0, -0.1, 1.1, math.nan, math.inf, "0.5", None, True]


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, FMLoRAModule])
@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES, ids=lambda value: str(value)[:12])
def test_values(front_end, name, value, message):
    with pytest.raises(MisconfigurationException, match=message) as error:
        front_end(**({"rho": 1.0} | {name: value}))
    assert front_end.__name__ in str(error.value)


@pytest.mark.parametrize("beta", BAD_BETAS, ids=str)
def test_beta(beta):
    with pytest.raises(MisconfigurationException, match=r"beta must be in \(0, 1\].*got " + re.escape(repr(beta))):
        EFMLoRA(1.0, beta=beta)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("accumulate_grad_batches", 0, "accumulate_grad_batches must be an integer >= 1, got 0"),
        ("accumulate_grad_batches", 1.5, "accumulate_grad_batches must be an integer >= 1, got 1.5"),
        ("gradient_clip_val", -1, "gradient_clip_val must be None or a number >= 0, got -1"),
        ("gradient_clip_val", "1", "gradient_clip_val must be None or a number >= 0, got '1'"),
        ("gradient_clip_val", math.nan, "gradient_clip_val must be None or a number >= 0, got nan"),
        ("gradient_clip_algorithm", "l2", "gradient_clip_algorithm must be 'norm' or 'value', got 'l2'"),
    ],
)
def test_module_values(name, value, message):
    with pytest.raises(MisconfigurationException, match=message):
        FMLoRAModule(1.0, **{name: value})


WRONG: dict[str, Any] = {
    "rho": -1,
    "estimator": "mean",
    "norm_scope": "all",
    "start_step": -1,
    "every_n_steps": 0,
    "adapter_name": 3,
}


def assert_names_all(error: Exception, wrong: dict[str, Any]) -> None:
    """One line for each argument, with what came."""
    lines = str(error).splitlines()
    assert f"{len(wrong)} problems" in lines[0]
    for name, value in wrong.items():
        assert [line for line in lines if f" {name} must be" in line and repr(value) in line], name


@pytest.mark.parametrize(
    ("front_end", "more"),
    [
        (EFMLoRA, {"beta": 2}),
        (FMLoRA, {}),
        (FMLoRAModule, {}),
        (
            FMLoRAModule,
            {"accumulate_grad_batches": 0, "gradient_clip_val": -1, "gradient_clip_algorithm": "l2"},
        ),
    ],
    ids=["EFMLoRA", "FMLoRA", "FMLoRAModule", "FMLoRAModule-step"],
)
def test_all_wrong_values_in_one_message(front_end, more):
    wrong = WRONG | more
    with pytest.raises(MisconfigurationException) as error:
        front_end(**wrong)
    assert_names_all(error.value, wrong)


@pytest.mark.parametrize(
    ("schedule", "arguments", "names"),
    [
        (LinearRho, {"start": -1, "end": math.nan, "total_steps": 0}, ["start", "end", "total_steps"]),
        (CosineRho, {"start": "1", "end": math.inf, "total_steps": 1.5}, ["start", "end", "total_steps"]),
        (LearningRateRho, {"rho": -1}, ["rho"]),
    ],
)
def test_schedule_values(schedule, arguments, names):
    with pytest.raises(ValueError, match=schedule.__name__) as error:
        schedule(**arguments)
    for name in names:
        assert f"{name} must be" in str(error.value)
        assert repr(arguments[name]) in str(error.value)


def test_settings_are_checked_when_they_are_changed() -> None:
    callback = EFMLoRA(0.5)
    callback.fit_methods.take([None, None])
    callback.beta, callback.every_n_steps, callback.rho = 0.5, 3, 0.1
    for method in callback.methods:
        assert (method.beta, method.every_n_steps, method.rho(0, 1, 1.0)) == (0.5, 3, 0.1)
    with pytest.raises(MisconfigurationException, match="beta"):
        callback.beta = 2.0
    with pytest.raises(MisconfigurationException, match="rho"):
        callback.rho = -1
    assert (callback.beta, callback.current_rho) == (0.5, 0.1)
