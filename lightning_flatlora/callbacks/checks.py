"""What is refused before training: values out of range, strategies that can't work, and how it is said."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lightning_names import callbacks_of, is_defined_by_lightning, is_lightning
from lightning_flatlora.schedules import RhoSchedule, is_radius


def value_problems(
    size_name: str, size: object, start_step: object, every_n_steps: object, adapter_name: object
) -> list[str]:
    """What is wrong with the arguments of a method, one line each: argument, what is allowed, what came."""
    problems = []
    if not isinstance(size, RhoSchedule) and not is_radius(size):
        problems.append(f"{size_name} must be a finite number >= 0 or a RhoSchedule, got {size!r}")
    for name, value, least in (("start_step", start_step, 0), ("every_n_steps", every_n_steps, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{name} must be an integer >= {least}, got {value!r}")
    if adapter_name is not None and not isinstance(adapter_name, str):
        problems.append(
            f"adapter_name must be the name of an adapter or None for the active ones, got {adapter_name!r}"
        )
    return problems


def perturbation_problems(beta: object, estimator: object, norm_scope: object) -> list[str]:
    """What is wrong with the arguments of EFMLoRA and FMLoRA beyond those of every method."""
    problems = []
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not (number and 0 < beta <= 1):  # type: ignore[operator]
        problems.append(f"beta must be in (0, 1], the weight of the fresh perturbation in the average, got {beta!r}")
    return (
        problems
        + choice_problems("estimator", estimator, Estimator)
        + choice_problems("norm_scope", norm_scope, NormScope)
    )


def choice_problems(name: str, value: object, allowed: Any) -> list[str]:
    """What is wrong with an argument that must be one of a Literal's values."""
    choices = get_args(allowed)
    return [] if value in choices else [f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}"]


def strategy_problems(trainer: Trainer, window: int, sync_ascent: bool, works_sharded: bool = True) -> list[str]:
    """Why the trainer's strategy can't work, one line each.

    Args:
        trainer: after its strategy is set up.
        window: batches of an optimizer step, as training starts.
        sync_ascent: whether the ascent's gradient is averaged over the ranks.
        works_sharded: whether the method can work where each rank holds a part of a parameter.
    """
    strategy = trainer.strategy
    if is_lightning(strategy, DeepSpeedStrategy):
        return [f"DeepSpeed owns the gradients and gives them to no callback: {_USE}"]
    if is_lightning(strategy, XLAStrategy, SingleDeviceXLAStrategy):
        return [
            f"{type(strategy).__name__} trains on TPUs, where nothing of this has been tested: "
            f"with accelerator='gpu' or 'cpu', {_USE}"
        ]
    if is_lightning(strategy, FSDPStrategy, ModelParallelStrategy) and not works_sharded:
        return [
            f"{type(strategy).__name__} leaves each rank a part of every weight, and this method needs them whole: "
            "use strategy='ddp'"
        ]
    if is_lightning(strategy, FSDPStrategy):
        return _fsdp1_problems(strategy, trainer.lightning_module.automatic_optimization, sync_ascent)
    if is_lightning(strategy, ModelParallelStrategy):
        return _fsdp2_problems(strategy, trainer.lightning_module, sync_ascent)
    if is_lightning(strategy, DDPStrategy):
        return foreign_problems(strategy) or _ddp_problems(strategy, _longest_window(trainer, window), sync_ascent)
    if is_lightning(strategy, SingleDeviceStrategy):
        return []
    return [f"the strategy {type(strategy).__name__} has not been tested: {_USE}"]


def foreign_problems(strategy: DDPStrategy) -> list[str]:
    """Why a third-party subclass of DDPStrategy does not behave as DDP does, as NeMo's for Megatron; one line each.

    Args:
        strategy: after it is set up.
    """
    model = strategy.model
    if is_defined_by_lightning(strategy) or model is None or model is strategy.lightning_module:
        return []
    name = type(strategy).__name__
    if not isinstance(model, DistributedDataParallel):
        return [
            f"the strategy {name} is a DDPStrategy whose model is a {type(model).__name__} and not PyTorch's "
            f"DistributedDataParallel, so it may share parameters and gradients among the ranks otherwise: {_USE}"
        ]
    if model.process_group.size() != strategy.world_size:
        return [
            f"the strategy {name} averages gradients over {model.process_group.size()} of {strategy.world_size} ranks, "
            f"so the ranks may hold parts of the model, which has not been tested: {_USE}"
        ]
    return []


def wrapping_problems(trainer: Trainer) -> list[str]:
    """What must be said before the strategy wraps the model, where its own error would lead astray."""
    strategy = trainer.strategy
    if is_lightning(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        return [
            "use_orig_params must be True, Lightning's default, got False: FSDP would make one parameter of several "
            "factors. Leave it out"
        ]
    return []


def _longest_window(trainer: Trainer, window: int) -> int:
    """The most batches of an optimizer step, now or in a later epoch."""
    schedules = [
        callback.scheduling.values()
        for callback in callbacks_of(trainer)
        if is_lightning(callback, GradientAccumulationScheduler)
    ]
    return max([window, *(size for sizes in schedules for size in sizes)])


def _ddp_problems(strategy: DDPStrategy, window: int, sync_ascent: bool) -> list[str]:
    came = [f"accumulate_grad_batches={window}"] if window > 1 else []
    came += [] if sync_ascent else ["sync_ascent=False"]
    if came and strategy._ddp_kwargs.get("static_graph", False):
        return [
            "DDP's static_graph=True crashes in a backward that does not synchronise (pytorch#143580), as with "
            f"{' and '.join(came)}: leave static_graph out"
        ]
    return []


def _fsdp1_problems(strategy: FSDPStrategy, automatic_optimization: bool, sync_ascent: bool) -> list[str]:
    problems = []
    if not automatic_optimization:
        problems.append(
            "manual optimization runs its backward inside FSDP's forward, which FSDP can't do (Lightning#19685): "
            "use the FMLoRA or EFMLoRA callback with automatic optimization, or ModelParallelStrategy (FSDP2)"
        )
    if strategy.sharding_strategy is not ShardingStrategy.FULL_SHARD:
        problems.append(
            f"sharding_strategy must be 'FULL_SHARD', got {strategy.sharding_strategy.name!r}: SHARD_GRAD_OP checks "
            "between the passes that no layer reads another weight, NO_SHARD is DDP (use strategy='ddp'), and the "
            "hybrid ones are not tested"
        )
    if strategy.cpu_offload is not None and strategy.cpu_offload.offload_params:
        problems.append(f"cpu_offload must be False, got True: {_OFFLOAD}")
    return problems + _sharded_problems(sync_ascent)


def _fsdp2_problems(strategy: ModelParallelStrategy, model: nn.Module, sync_ascent: bool) -> list[str]:
    problems = []
    mesh = strategy.device_mesh["tensor_parallel"]
    if mesh.size() > 1:
        problems.append(
            f"tensor_parallel_size must be 1, got {mesh.size()}: a factor split over the ranks of one product is not "
            f"supported. Use ModelParallelStrategy(data_parallel_size={strategy.world_size}, tensor_parallel_size=1)"
        )
    if any(p.device.type != strategy.root_device.type for p in model.parameters()):
        problems.append(f"fully_shard's offload_policy must be left out, got CPU offloading: {_OFFLOAD}")
    return problems + _sharded_problems(sync_ascent)


_OFFLOAD = "parameters would lie on the CPU, while E must be where the layers run"
_USE = "use strategy='ddp', ModelParallelStrategy (FSDP2) or, with automatic optimization, strategy='fsdp'"


def _sharded_problems(sync_ascent: bool) -> list[str]:
    if sync_ascent:
        return []
    return ["sync_ascent=False needs each rank's own gradient, which FSDP does not keep: use sync_ascent=True, or DDP"]


def warn_of_rounding(callback: object, what: str, parameters: Iterable[nn.Parameter]) -> None:
    """Say, once, that a small perturbation of parameters kept in 16 bits may be lost."""
    low = [p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        rank_zero_warn(
            f"{type(callback).__name__}: {what} is kept in {low[0]}, so {what} + E is rounded to it and a small "
            "rho may be lost. Keep it in float32, as with precision='bf16-mixed'."
        )


def message(callback: object, problems: list[str]) -> str:
    """One message for all problems, headed by the name of the front end that the user wrote."""
    name = type(callback).__name__.removeprefix("_").removesuffix("Driver")
    if len(problems) == 1:
        return f"{name}: {problems[0]}"
    return "\n".join([f"{name}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
