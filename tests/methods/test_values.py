"""Invalid values are refused where they are given, all in one message, under the argument's public name."""

import math
from typing import Any

import pytest
import torch
from helpers import make_net
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import EFMLoRA, FMLoRA, FMLoRAModule, LinearRho, loops
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep

BAD: dict[str, tuple[str, list[Any]]] = {
    "rho": ("a finite number >= 0 or a RhoSchedule", [-1, math.nan, math.inf, "2", True]),
    "estimator": ("'average' or 'projected'", ["mean", None]),
    "norm_scope": ("'global' or 'layer'", ["all"]),
    "start_step": ("an integer >= 0", [-1, 1.5]),
    "every_n_steps": ("an integer >= 1", [0, "2", True]),
    "beta": (
        "in (0, 1], the weight of the fresh perturbation in the average",
        [0, -0.1, 1.1, math.nan, math.inf, "0.5", None, True],
    ),
}
OF_MODULES: dict[str, tuple[str, list[Any]]] = {
    "accumulate_grad_batches": ("an integer >= 1", [0, 1.5]),
    "gradient_clip_val": ("None or a number >= 0", [-1, "1", math.nan]),
    "gradient_clip_algorithm": ("'norm' or 'value'", ["l2"]),
}


def of_loop(name: str) -> Any:
    def make(rho: Any = None, **settings: Any) -> Any:
        net = make_net()
        return getattr(loops, name)(net, torch.optim.SGD(net.parameters(), lr=0.1), rho, **settings)

    return make


FRONT_ENDS: dict[str, Any] = {
    "EFMLoRA": EFMLoRA,
    "FMLoRA": FMLoRA,
    "FMLoRAModule": FMLoRAModule,
    "EFMLoRA in a loop": of_loop("EFMLoRA"),
    "FMLoRA in a loop": of_loop("FMLoRA"),
}


def values(table: dict[str, tuple[str, list[Any]]]) -> Any:
    cases = []
    for name, (allowed, bad) in table.items():
        cases += [(name, value, allowed) for value in bad]
    return pytest.mark.parametrize(("name", "value", "allowed"), cases)


def refused(make: Any, settings: dict[str, Any]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        make(**{"rho": 1.0, **settings})
    return str(caught.value)


@values(BAD)
def test_values(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        EFMLoRAStep(**{"rho": 1.0, name: value})
    assert str(caught.value) == f"EFMLoRA: {name} must be {allowed}, got {value!r}"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_without_rho_the_error_says_where_a_value_comes_from(front_end: str) -> None:
    assert "rho must be given: start from rho=0.05" in refused(FRONT_ENDS[front_end], {"rho": None})


@values(OF_MODULES)
def test_values_of_modules(name: str, value: Any, allowed: str) -> None:
    assert f"{name} must be {allowed}, got {value!r}" in refused(FMLoRAModule, {name: value})


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_all_wrong_values_in_one_message(front_end: str) -> None:
    """One line for each argument, with the given value."""
    tables = BAD | (OF_MODULES if front_end == "FMLoRAModule" else {})
    wrong = {name: bad[0] for name, (_, bad) in tables.items() if name != "beta" or front_end.startswith("EFMLoRA")}
    heading, *lines = refused(FRONT_ENDS[front_end], wrong).splitlines()
    assert heading == f"{front_end.split()[0]}: {len(wrong)} problems"
    for name, value in wrong.items():
        assert [line for line in lines if f" {name} must be" in line and repr(value) in line], name


@pytest.mark.parametrize("name", ["beta", "every_n_steps", "estimator"])
def test_other_settings_are_assigned_to_the_method(name: str) -> None:
    """On the callback they would silently have no effect."""
    callback = EFMLoRA(0.5)
    with pytest.raises(AttributeError, match=f"assign to callback.method.{name}"):
        setattr(callback, name, 1)
    callback.mine = 1  # type: ignore[attr-defined]
    callback.method.beta = 0.5


@pytest.mark.parametrize("kind", [EFMLoRA, FMLoRA])
def test_rho_is_checked_when_it_is_changed(kind: Any) -> None:
    """The new value reaches the methods of all optimizers."""
    callback = kind(0.5)
    assert callback.rho == 0.5
    callback.per_optimizer.take_optimizers([None, None])
    callback.rho = 0.1
    assert [method.current_rho for method in callback.methods] == [0.1, 0.1]
    for value in (None, *BAD["rho"][1]):
        with pytest.raises(MisconfigurationException, match="rho"):
            callback.rho = value
    assert callback.current_rho == 0.1
    callback.rho = LinearRho(0.2, 0.2)
    assert callback.current_rho == pytest.approx(0.2)
