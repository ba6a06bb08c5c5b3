"""Which optimizer steps take a fresh perturbation, and of which size, whoever runs the training loop."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.schedules import RhoSchedule


def refreshes(step: int, start_step: int, every_n_steps: int) -> bool:
    """Whether an optimizer step, counted from 0, takes a fresh perturbation."""
    # The count starts at start_step, so that this step is the first to perturb whatever every_n_steps is.
    since_start = step - start_step
    return since_start >= 0 and since_start % every_n_steps == 0


def size_at(size: RhoSchedule, pair_group: PairGroup, horizon: float, param_groups: Sequence[dict[str, Any]]) -> float:
    """The size of the coming step of a pair group in a run of so many optimizer steps; see :func:`size_problems`."""
    share = 1.0
    if size.needs_learning_rate and param_groups:
        param_group = param_groups[0]
        # Not only None: a hand-written warm-up may start at 0.
        if not pair_group.initial_lr:
            pair_group.initial_lr = float(param_group.get("initial_lr", param_group["lr"]))
        # Relative to the initial value, so that a schedule starts at the size that the user gave.
        share = param_group["lr"] / pair_group.initial_lr if pair_group.initial_lr else 0.0
    return size(pair_group.step, horizon, share)


def size_problems(argument: str, size: float, step: int) -> list[str]:
    """What is wrong with a size that a user's own schedule gave; the package's own are checked when they are made."""
    if 0 <= size < math.inf:
        return []
    return [f"{argument} must give a finite number >= 0, and gave {size} at step {step}"]


def followed_groups(optimizer: Optimizer, followed: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups that hold a parameter whose learning rate a schedule may follow."""
    identities = {id(parameter) for parameter in followed}
    param_groups = []
    for param_group in optimizer.param_groups:
        if any(id(parameter) in identities for parameter in param_group["params"]):
            param_groups.append(param_group)
    return param_groups


def rate_problems(argument: str, param_groups: Sequence[dict[str, Any]]) -> list[str]:
    """Why a size, as the user wrote it, can't follow the learning rate of parameter groups."""
    problems = []
    if any(isinstance(param_group["lr"], Tensor) for param_group in param_groups):
        problems.append(
            f"{argument} follows the learning rate, a tensor here: reading it would make the host wait. Give the "
            "optimizer a float, or choose another schedule"
        )
    if len(param_groups) > 1:
        problems.append(
            f"{argument} follows the learning rate, but what it moves is in several parameter groups: put it into "
            "one, or choose another schedule"
        )
    return problems


def lacks_horizon(size: RhoSchedule) -> bool:
    """Whether a schedule spreads over a run whose length its own arguments do not give."""
    return size.needs_horizon and getattr(size, "total_steps", None) is None
