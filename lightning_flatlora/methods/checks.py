"""Arguments that are refused, and the one message in which all problems of a configuration are reported."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.schedules import RhoSchedule, is_integer, is_size


def value_problems(
    size_name: str, size: object, start_step: object, every_n_steps: object, adapter_name: object, finder: object
) -> list[str]:
    """What is wrong with the arguments of a method, one line each: the argument, what is allowed and what was given."""
    # All problems are collected, so that a user need not run once for each.
    problems = []
    if not isinstance(size, RhoSchedule) and not is_size(size):
        problems.append(f"{size_name} must be a finite number >= 0 or a RhoSchedule, got {size!r}")
    problems += integer_problems("start_step", start_step, least=0)
    problems += integer_problems("every_n_steps", every_n_steps, least=1)
    if adapter_name is not None and not isinstance(adapter_name, str):
        problems.append(
            f"adapter_name must be the name of an adapter or None for the active ones, got {adapter_name!r}"
        )
    return problems + finder_problems(finder, adapter_name)


def finder_problems(finder: object, adapter_name: object) -> list[str]:
    """What is wrong with a finder of pairs, one line for each problem."""
    problems = []
    if finder is not None and not callable(finder):
        problems.append(f"finder must be a function of the model, or None for peft's layers, got {finder!r}")
    if finder is not None and adapter_name is not None:
        problems.append("adapter_name applies to peft layers, finder to all others: give one of them")
    return problems


def perturbation_problems(beta: object, estimator: object, norm_scope: object) -> list[str]:
    """What is wrong with the arguments that EFMLoRA and FMLoRA have beyond those of every method."""
    problems = []
    if not is_number(beta) or not 0 < beta <= 1:  # type: ignore[operator]
        problems.append(f"beta must be in (0, 1], the weight of the fresh perturbation in the average, got {beta!r}")
    problems += choice_problems("estimator", estimator, Estimator)
    problems += choice_problems("norm_scope", norm_scope, NormScope)
    return problems


def rate_problems(argument: str, param_groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """List why a size, as the user wrote it, can't follow the learning rate of parameter groups."""
    problems = []
    if any(isinstance(group["lr"], Tensor) for group in param_groups):
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


def rounding_problems(what: str, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Say that a small perturbation of parameters that are stored in 16 bits may be lost, if any are."""
    low = [p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    if not low:
        return []
    return [
        f"{what} is kept in {low[0]}, so a small change of it may be rounded away. Keep it in float32, as with "
        "precision='bf16-mixed'."
    ]


def without_gradient(place: str) -> str:
    """Say that no pair of an optimizer has had a gradient so far."""
    return (
        f"no B of a pair{place} has had a gradient in any step so far, so the method had no effect there: the "
        "loss must depend on what the adapted layers compute (not under torch.no_grad, not detached), and the "
        "gradients must still be there in on_before_optimizer_step, which they are not if an optimizer steps "
        "inside backward"
    )


def changed_settings(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Which arguments are not what they were in the run that a checkpoint is of, one line each."""
    problems = []
    for name, value in settings.items():
        if saved[name] != value:
            problems.append(
                f"{name} must be {saved[name]!r} as in the checkpoint, got {value!r}: "
                "change it back, or start a new run from the weights"
            )
    return problems


def integer_problems(name: str, value: object, least: int) -> list[str]:
    """What is wrong with an argument that must be an integer of at least some size."""
    if is_integer(value, least):
        return []
    return [f"{name} must be an integer >= {least}, got {value!r}"]


def choice_problems(name: str, value: object, allowed: Any) -> list[str]:
    """What is wrong with an argument that must be one of a Literal's values."""
    choices = get_args(allowed)
    if value in choices:
        return []
    return [f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}"]


def is_number(value: object) -> bool:
    """Whether a value is a number; a bool, which Python takes for an integer, is not."""
    return not isinstance(value, bool) and isinstance(value, Real)


SEVERAL_GRADIENTS = "takes several gradients a step, and the method knows one: use AdamW or SGD"
"""What is wrong with an optimizer that calls its closure more than once, after its name."""


def optimizer_problems(optimizers: Sequence[Optimizer]) -> list[str]:
    """What can't work about optimizers, as far as they say it themselves."""
    problems = []
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        problems.append(f"LBFGS {SEVERAL_GRADIENTS}")
    if any(_is_private(optimizer) for optimizer in optimizers):
        problems.append(
            "Opacus clips the gradient of each example and adds its noise inside the optimizer's step, and the "
            "perturbation would be taken from the gradients before that, which the privacy budget does not cover: "
            "train plain LoRA under Opacus"
        )
    # Of several, the one that maximizes may train something else.
    groups = getattr(optimizers[0], "param_groups", []) if len(optimizers) == 1 else []
    if any(group.get("maximize") for group in groups):
        problems.append(
            "the optimizer has maximize=True, and the perturbation raises what training_step returns, so it would go "
            "to the better side: return its negative as the loss, and minimize"
        )
    return problems


def _is_private(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of Opacus, for differential privacy."""
    return any(kind.__module__.split(".")[0] == "opacus" for kind in type(optimizer).__mro__)


def title_of(owner: object) -> str:
    """The name that the user wrote for what is wrong: its class's, or the one that it gives as its ``title``."""
    return getattr(owner, "title", type(owner).__name__)


def refuse(owner: object, problems: list[str]) -> None:
    """Raise one error that lists all problems, if there are any."""
    if problems:
        raise MisconfigurationException(message(owner, problems))


def message(owner: object, problems: list[str]) -> str:
    """Write one message for all problems, headed by the name that the user wrote."""
    if len(problems) == 1:
        return f"{title_of(owner)}: {problems[0]}"
    return "\n".join([f"{title_of(owner)}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
