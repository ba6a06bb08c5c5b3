"""Facts about Lightning's strategies: which are refused and why, and when gradients are averaged.

No other file of the package asks which strategy a Trainer has. The ranks' parts of a parameter, and the communication
itself, are the subject of :mod:`lightning_flatlora.sharding`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Trainer, strategies
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.amp import GradScaler
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_flatlora.callbacks.both_lightnings import callbacks_of, is_lightning
from lightning_flatlora.callbacks.training_step import window_of
from lightning_flatlora.patching import nothing, put_on_instance
from lightning_flatlora.wrappers import ONE_PASS_ONLY, wrapping_problems

_USE = "use strategy='ddp', ModelParallelStrategy (FSDP2) or, with automatic optimization, strategy='fsdp'"
_DEEPSPEED = strategies.DeepSpeedStrategy
_SHARDED = (strategies.FSDPStrategy, strategies.ModelParallelStrategy, _DEEPSPEED)
_SUPPORTED = (strategies.SingleDeviceStrategy, strategies.DDPStrategy, *_SHARDED)
# For TPUs; these inherit from supported strategies.
_XLA = (strategies.XLAStrategy, strategies.SingleDeviceXLAStrategy)


# -- refused strategies


def strategy_problems(trainer: Trainer, method: Any, takes_two_passes: bool) -> list[str]:
    """List why a method can't work under the trainer's strategy, once this is set up, one line for each reason."""
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    sync_ascent = getattr(method, "sync_ascent", True)
    problems = _kind_problems(strategy)
    if is_lightning(strategy, strategies.ModelParallelStrategy):
        size, copies = (strategy.device_mesh[name].size() for name in ("tensor_parallel", "data_parallel"))
        if size > 1 and copies > 1:
            problems.append(
                f"tensor_parallel_size must be 1 or all {strategy.world_size} processes, got {size}: use "
                f"ModelParallelStrategy(data_parallel_size={strategy.world_size}, tensor_parallel_size=1)"
            )
    if not problems and strategy.model is not None:
        unsynchronized = _unsynchronized(trainer, sync_ascent)
        problems = wrapping_problems(strategy.model, unsynchronized, takes_fsdp1=True, takes_deepspeed=True)
    if problems or not is_lightning(strategy, *_SHARDED):
        return problems
    if not method.works_sharded:
        return [f"{name} leaves each rank a part of every weight, but this method needs all of it: use strategy='ddp'"]
    if is_lightning(strategy, _DEEPSPEED) and takes_two_passes:
        problems.append(ONE_PASS_ONLY)
    if is_lightning(strategy, strategies.FSDPStrategy):
        problems += _fsdp1_problems(strategy, trainer.lightning_module.automatic_optimization)
    if not sync_ascent:
        problems.append(
            "sync_ascent=False needs each rank's own gradient, which FSDP does not keep: use sync_ascent=True, or DDP"
        )
    return problems


def _kind_problems(strategy: strategies.Strategy) -> list[str]:
    """List why a method can't work under this kind of strategy."""
    name = type(strategy).__name__
    if is_lightning(strategy, *_XLA) or not is_lightning(strategy, *_SUPPORTED):
        return [f"the strategy {name} has not been tested: with accelerator='gpu' or 'cpu', {_USE}"]
    # DeepSpeed's is one, too, but a class of its own.
    if is_lightning(strategy, _DEEPSPEED) or not is_lightning(strategy, strategies.DDPStrategy):
        return []
    if strategy.model is None:
        return []
    # Another library's subclass may not behave as DDP does, such as NeMo's for Megatron.
    model = strategy.model
    if isinstance(model, DistributedDataParallel) and model.process_group.size() == strategy.world_size:
        return []
    return [
        f"the strategy {name} is a DDPStrategy, but its model, a {type(model).__name__}, is not PyTorch's "
        f"DistributedDataParallel over all {strategy.world_size} ranks, so gradients may be shared otherwise: {_USE}"
    ]


def _unsynchronized(trainer: Trainer, sync_ascent: bool) -> list[str]:
    """List the settings that make some backward passes not average gradients over the ranks."""
    window = window_of(trainer)
    for callback in callbacks_of(trainer):
        if is_lightning(callback, GradientAccumulationScheduler):
            window = max(window, *callback.scheduling.values())
    causes = [] if sync_ascent else ["sync_ascent=False"]
    return [f"accumulate_grad_batches={window}", *causes] if window > 1 else causes


def problems_before_wrapping(trainer: Trainer) -> list[str]:
    """List problems that must be reported before the strategy wraps the model, whose error would be misleading."""
    strategy = trainer.strategy
    if is_lightning(strategy, strategies.FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        return ["use_orig_params must be True, got False: FSDP would merge factors into one parameter, so leave it out"]
    return []


def monitor_problems(strategy: strategies.Strategy) -> list[str]:
    """List why flatness can't be measured under a strategy, one line for each reason."""
    if not _kind_problems(strategy) and not is_lightning(strategy, *_SHARDED):
        return []
    return [
        f"the strategy {type(strategy).__name__} is not supported, because a sharded model has no whole weights to "
        "perturb: use one device or strategy='ddp', or measure the saved adapter afterwards"
    ]


def checkpoint_problems(strategy: strategies.Strategy) -> list[str]:
    """List why checkpoints of adapters can't be written under a strategy."""
    if is_lightning(strategy, _DEEPSPEED):
        return [
            "DeepSpeed stores weights in its own format: use Lightning's ModelCheckpoint, with "
            "DeepSpeedStrategy(exclude_frozen_parameters=True), or DDP or FSDP"
        ]
    return []


def _fsdp1_problems(strategy: strategies.FSDPStrategy, automatic_optimization: bool) -> list[str]:
    problems = []
    if not automatic_optimization:
        problems.append(
            "manual optimization runs its backward inside FSDP's forward, which FSDP can't do (Lightning#19685): "
            "use the FMLoRA or EFMLoRA callback with automatic optimization, or ModelParallelStrategy (FSDP2)"
        )
    if strategy.sharding_strategy is not ShardingStrategy.FULL_SHARD:
        problems.append(
            f"sharding_strategy must be 'FULL_SHARD', got {strategy.sharding_strategy.name!r}: SHARD_GRAD_OP refuses "
            "perturbed weights, NO_SHARD is DDP (use strategy='ddp'), and the hybrid ones are not tested"
        )
    if strategy.cpu_offload is not None and strategy.cpu_offload.offload_params:
        problems.append("cpu_offload must be False, got True: parameters would be on the CPU, E on the layers' device")
    return problems


# -- when gradients are averaged over the ranks


def ascent_stays_local(trainer: Trainer, sync_ascent: bool) -> bool:
    """Say whether the ascent's backward must not average gradients, even in a batch that ends an accumulation window.

    Under FSDP1, a synchronizing backward would turn the window's gradients, which are not reduced yet, into shards.
    Under DDP it would forget which parameters the window has used, so with find_unused_parameters some would not be
    reduced.
    """
    if not is_lightning(trainer.strategy, strategies.DDPStrategy, strategies.FSDPStrategy):
        return False
    return window_of(trainer) > 1 or not sync_ascent


def completes_window(strategy: strategies.Strategy) -> bool:
    """Say whether an announced optimizer step will be taken: DeepSpeed announces one for each micro-batch."""
    model: Any = strategy.model
    return not is_lightning(strategy, _DEEPSPEED) or model.is_gradient_accumulation_boundary()


def loss_scaler_of(trainer: Trainer) -> GradScaler | None:
    """Return what skips a step with a gradient that is not finite; None if nothing does."""
    if is_lightning(trainer.strategy, _DEEPSPEED):  # skips it itself, in every precision
        return GradScaler(enabled=False)
    return getattr(trainer.precision_plugin, "scaler", None)


def synchronizes(strategy: strategies.Strategy) -> bool:
    """Say whether the coming backward averages the gradients over the ranks."""
    # DDP's flag; all other strategies average in every backward, or have nothing to average.
    return getattr(strategy.model, "require_backward_grad_sync", True)


def backward_without_sync(strategy: strategies.Strategy) -> AbstractContextManager[Any]:
    """Keep a backward inside from averaging gradients over the ranks."""
    block: Callable[[], AbstractContextManager[Any]] = getattr(strategy, "block_backward_sync", nullcontext)
    return block()


# -- a strategy's own defects


def skip_clipping_without_gradients(trainer: Trainer) -> Callable[[], None]:
    """Let an FSDP1 rank whose shards hold no trained value skip clipping, in which PyTorch raises an internal error.

    FSDP1 cuts the values of a unit into one piece per rank, and LoRA's small factors may all lie in one piece. Clipping
    by value treats each entry separately, so skipping it on the other ranks changes nothing.

    Returns:
        A function that puts Lightning's own method back.
    """
    if not is_lightning(trainer.strategy, strategies.FSDPStrategy):
        return nothing
    plugin: Any = trainer.precision_plugin
    clip = plugin.clip_grad_by_value

    def clip_grad_by_value(optimizer: Any, clip_val: Any) -> None:
        if any(parameter.grad is not None for parameter in plugin.main_params(optimizer)):
            clip(optimizer, clip_val)

    return put_on_instance(plugin, "clip_grad_by_value", clip_grad_by_value)
