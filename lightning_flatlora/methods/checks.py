"""Arguments that are refused, and the one message in which all problems of a configuration are reported."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_flatlora import wrappers
from lightning_flatlora.pairs.lora_pair import PairSearch
from lightning_flatlora.schedules import is_integer


def rounding_problems(parameters: Iterable[nn.Parameter]) -> list[str]:
    """Say that a small perturbation of parameters that are stored in 16 bits may be lost, if any are."""
    low = [p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    if not low:
        return []
    problem = f"a parameter that is perturbed is kept in {low[0]}, which may round a small change away"
    return [f"{problem}: use float32, as with precision='bf16-mixed'"]


def integer_problems(name: str, value: object, least: int) -> list[str]:
    """List what is wrong with an argument that must be an integer of at least some size."""
    if is_integer(value, least):
        return []
    return [f"{name} must be an integer >= {least}, got {value!r}"]


def choice_problems(name: str, value: object, allowed: Any) -> list[str]:
    """List what is wrong with an argument that must be one of a Literal's values."""
    if value in get_args(allowed):
        return []
    return [f"{name} must be {' or '.join(map(repr, get_args(allowed)))}, got {value!r}"]


SEVERAL_GRADIENTS = "takes several gradients a step, and the method knows one: use AdamW or SGD"
"""What is wrong with an optimizer that calls its closure more than once, after its name."""


def optimizer_problems(optimizers: Sequence[Optimizer]) -> list[str]:
    """List what can't work about optimizers, as far as they say it themselves."""
    problems = []
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        problems.append(f"LBFGS {SEVERAL_GRADIENTS}")
    if any(wrappers.is_of("opacus", optimizer) for optimizer in optimizers):
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


def changed_problems(method: Any, saved: dict[str, Any]) -> list[str]:
    """Name the settings that can't change within a run and are others than the saved ones."""
    problems = []
    for name in method.fixed:
        own = getattr(method, name)
        if own != saved[name]:
            problems.append(
                f"{name} must be {saved[name]!r} as in the checkpoint, got {own!r}: change it back, or start anew"
            )
    return problems


def say_start(method: Any, pairs: Sequence[Any], search: PairSearch, orphans: Sequence[Any] = ()) -> None:
    """Say what a method perturbs, by how much and when, and which layers and pairs of no optimizer it leaves out."""
    if pairs:
        ranks = sorted({method.sharding.shape(pair.B)[not pair.is_transposed] // pair.experts for pair in pairs})
        when = f"start_step={method.start_step}, every_n_steps={method.every_n_steps}"
        found = f"{len(pairs)} LoRA pairs of rank {', '.join(map(str, ranks))}"
        rank_zero_info(f"{method.title}: {found}, {method.argument}, {when}")
    left_out = list(search.left_out if method.left_out is None else method.left_out)
    # A method may leave out some of the pairs, which are what the search has not left out.
    share = search.share_left_out + (1 - search.share_left_out) * method.share_left_out
    if left_out:
        left_out.append(f"in all {share:.1%} of the adapters' trained parameters")
    if orphans:
        left_out.append(f"{len(orphans)} pairs that the optimizer lacks, as {orphans[0].name}")
    if left_out:
        say = rank_zero_warn if share > 0.2 else rank_zero_info
        say(f"{method.title} leaves unperturbed: " + "; ".join(left_out))


def refuse(owner: object, problems: list[str]) -> None:
    """Raise one error that lists all problems, if there are any."""
    if problems:
        raise MisconfigurationException(message(owner, problems))


def message(owner: object, problems: list[str]) -> str:
    """Write one message for all problems, headed by the owner's ``title``, or else by the name of its class."""
    title = getattr(owner, "title", type(owner).__name__)
    if len(problems) == 1:
        return f"{title}: {problems[0]}"
    return "\n".join([f"{title}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
