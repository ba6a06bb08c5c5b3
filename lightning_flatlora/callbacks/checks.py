"""What is refused before training: values out of range, strategies that can't work, and how it is said."""

from typing import get_args

from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy

from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.schedules import RhoSchedule, is_radius


def value_problems(
    rho: object,
    beta: object,
    estimator: object,
    norm_scope: object,
    start_step: object,
    every_n_steps: object,
    adapter_name: object,
) -> list[str]:
    """What is wrong with the arguments of a front end, one line each: argument, what is allowed, what came."""
    problems = []
    if not isinstance(rho, RhoSchedule) and not is_radius(rho):
        problems.append(f"rho must be a finite number >= 0 or a RhoSchedule, got {rho!r}")
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not (number and 0 < beta <= 1):  # type: ignore[operator]
        problems.append(f"beta must be in (0, 1], the weight of the fresh perturbation in the average, got {beta!r}")
    for name, value, allowed in (
        ("estimator", estimator, get_args(Estimator)),
        ("norm_scope", norm_scope, get_args(NormScope)),
    ):
        if value not in allowed:
            problems.append(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    for name, value, least in (("start_step", start_step, 0), ("every_n_steps", every_n_steps, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{name} must be an integer >= {least}, got {value!r}")
    if adapter_name is not None and not isinstance(adapter_name, str):
        problems.append(
            f"adapter_name must be the name of an adapter or None for the active ones, got {adapter_name!r}"
        )
    return problems


def strategy_problems(strategy: Strategy, window: int, sync_ascent: bool) -> list[str]:
    """Why a strategy can't work, one line each.

    Args:
        strategy: the trainer's.
        window: batches of an optimizer step.
        sync_ascent: whether the ascent's gradient is averaged over the ranks.
    """
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and "XLA" not in type(strategy).__name__:
        static_graph = getattr(strategy, "_ddp_kwargs", {}).get("static_graph", False)
        if static_graph and (window > 1 or not sync_ascent):
            return [
                "DDP's static_graph crashes where a backward does not synchronise, as under gradient accumulation "
                "(pytorch#143580) or with sync_ascent=False: leave static_graph out"
            ]
        return []
    kind = "shards or owns" if isinstance(strategy, ParallelStrategy) else "may own"
    return [
        f"the strategy {type(strategy).__name__} {kind} the parameters and gradients that the perturbation is made of, "
        "which is not supported yet: use strategy='ddp' or a single device"
    ]


def message(callback: object, problems: list[str]) -> str:
    """One message for all problems, headed by the name of the front end that the user wrote."""
    name = type(callback).__name__.removeprefix("_").removesuffix("Driver")
    if len(problems) == 1:
        return f"{name}: {problems[0]}"
    return "\n".join([f"{name}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
