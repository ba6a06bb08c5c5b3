"""Check arguments, and report all problems of a configuration in one message."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_flatlora import wrappers
from lightning_flatlora.pairs.lora_pair import PairSearch
from lightning_flatlora.rank_zero import rank_zero_info, rank_zero_warn
from lightning_flatlora.schedules import is_integer


def rounding_problems(parameters: Iterable[nn.Parameter]) -> list[str]:
    """Say that small perturbations may be lost if any of the parameters are stored in 16 bits."""
    low = [p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    if not low:
        return []
    problem = f"a perturbed parameter is stored in {low[0]}, which may round small changes away"
    return [f"{problem}: use float32, as with precision='bf16-mixed'"]


def integer_problems(name: str, value: object, least: int) -> list[str]:
    """List what is wrong with an argument that must be an integer >= ``least``."""
    if is_integer(value, least):
        return []
    return [f"{name} must be an integer >= {least}, got {value!r}"]


def choice_problems(name: str, value: object, allowed: Any) -> list[str]:
    """List what is wrong with an argument that must be one of a Literal's values."""
    if value in get_args(allowed):
        return []
    return [f"{name} must be {' or '.join(map(repr, get_args(allowed)))}, got {value!r}"]


SEVERAL_GRADIENTS = "needs several gradients per step, but the method has only one: use AdamW or SGD"
"""The problem with an optimizer that calls its closure more than once; it follows the optimizer's name."""


def optimizer_problems(optimizers: Sequence[Optimizer]) -> list[str]:
    """List why optimizers can't work, as far as their class and settings show it."""
    problems = []
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        problems.append(f"LBFGS {SEVERAL_GRADIENTS}")
    if any(wrappers.is_of("opacus", optimizer) for optimizer in optimizers):
        problems.append(wrappers.OPACUS)
    for optimizer in optimizers:
        problems += _deepspeed_problems(optimizer)
    # With several optimizers, the one that maximizes may train something else.
    groups = getattr(optimizers[0], "param_groups", []) if len(optimizers) == 1 else []
    if any(group.get("maximize") for group in groups):
        problems.append(
            "the optimizer has maximize=True, but the perturbation always raises the returned loss, so it would point "
            "to better weights, not worse: return the negative as the loss, and minimize"
        )
    return problems


# DeepSpeed's optimizers whose parts of gradients can be read: of ZeRO-1 and 2, of ZeRO-3, and of ZeRO-1.
_ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


def _deepspeed_problems(optimizer: Any) -> list[str]:
    """List why the gradients in one of DeepSpeed's optimizers can't be read."""
    kind, inner = type(optimizer), getattr(optimizer, "optimizer", None)
    wants = "use ZeRO stage 1, 2 or 3 with AdamW"
    if any("onebit" in type(each).__module__ or "Muon" in type(each).__name__ for each in (optimizer, inner)):
        return [f"{type(inner or optimizer).__name__} changes gradients before its step: {wants}"]
    if not wrappers.is_deepspeeds(optimizer):
        return []
    if kind.__name__ not in _ZERO:
        return [f"DeepSpeed's {kind.__name__} is not supported: {wants}"]
    offloads = [name for name in ("cpu_offload", "offload_optimizer", "offload_param") if getattr(optimizer, name, 0)]
    if offloads or getattr(optimizer, "zenflow", False):
        return ["DeepSpeed's offloading is not supported: leave offload_optimizer and offload_param out"]
    return []


def changed_problems(method: Any, saved: dict[str, Any]) -> list[str]:
    """Name settings that differ from the saved ones, but can't change within a run."""
    problems = []
    for name in method.fixed:
        own = getattr(method, name)
        if own != saved[name]:
            problems.append(
                f"{name} must be {saved[name]!r} as in the checkpoint, got {own!r}: change it back, or start a new run"
            )
    return problems


def say_start(method: Any, pairs: Sequence[Any], search: PairSearch, orphans: Sequence[Any] = ()) -> None:
    """Log what a method perturbs, how much and when, and the layers and pairs that it leaves out."""
    if pairs:
        ranks = sorted({method.sharding.shape(pair.B)[not pair.is_transposed] // pair.experts for pair in pairs})
        when = f"start_step={method.start_step}, every_n_steps={method.every_n_steps}"
        found = f"{len(pairs)} LoRA pairs of rank {', '.join(map(str, ranks))}"
        rank_zero_info(f"{method.title}: {found}, {method.argument}, {when}")
    left_out = list(search.left_out if method.left_out is None else method.left_out)
    # A method may leave out some of the pairs that the search has found.
    share = search.share_left_out + (1 - search.share_left_out) * method.share_left_out
    if left_out:
        left_out.append(f"in all {share:.1%} of the adapters' trained parameters")
    if orphans:
        left_out.append(f"{len(orphans)} pairs that the optimizer lacks, such as {orphans[0].name}")
    if left_out:
        say = rank_zero_warn if share > 0.2 else rank_zero_info
        say(f"{method.title} leaves unperturbed: " + "; ".join(left_out))


def refuse(owner: object, problems: list[str]) -> None:
    """Raise one error that lists all problems, if there are any."""
    if problems:
        # Not above: its import takes seconds, which other loops need not wait.
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException(message(owner, problems))


def message(owner: object, problems: list[str]) -> str:
    """Write one message for all problems, headed by the owner's ``title`` or class name."""
    title = getattr(owner, "title", type(owner).__name__)
    if len(problems) == 1:
        return f"{title}: {problems[0]}"
    return "\n".join([f"{title}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
