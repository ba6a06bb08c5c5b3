"""Runs on one or several processes that write and read checkpoints; each rank returns its final state."""

import os
from typing import Any

import lightning as L
import torch
from fits import ShardedAutomatic, full_weights, in_float64
from float64_runs import BETA, RHO, dataset, network
from helpers import ResumableLoader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import fsdp
from torch import Tensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.tensor import DTensor

from lightning_flatlora import AdapterCheckpoint, CosineRho, EFMLoRA

BATCHES, EPOCHS, EVERY = 6, 2, 3
MIDDLE, END = 9, BATCHES * EPOCHS
"""Optimizer steps: in the middle of the second epoch, and the last."""


SAVERS = {"adapter": AdapterCheckpoint, "lightning": ModelCheckpoint}


def full_state_on_cpu(module: Any, world_size: int, rank0_only: bool = True) -> Any:
    """Lightning's context without offloading, which on the CPU returns views of memory that FSDP1 frees or reuses."""
    choice = {"offload_to_cpu": False, "rank0_only": rank0_only}
    configs = FullStateDictConfig(**choice), FullOptimStateDictConfig(**choice)
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)


fsdp._get_full_state_dict_context = full_state_on_cpu  # type: ignore[attr-defined]


def loader(size: int = 4) -> ResumableLoader:
    """This rank's share of each batch; the order of the batches is shuffled."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    x, y = dataset().tensors
    batches = []
    for start in range(0, BATCHES * size, size):
        own = slice(start + rank, start + size, ranks)
        batches.append((x[own], y[own]))
    return ResumableLoader(batches)


def trainer_of(strategy: str, callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    """A quiet Trainer; "single" means one process without a strategy."""
    settings = {"max_epochs": EPOCHS, **settings}
    if strategy != "single":
        settings |= in_float64(strategy, **settings.pop("strategy_settings", {}))
    else:
        settings |= {"devices": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", callbacks=callbacks, **quiet, **settings)


def train(
    folder: str,
    strategy: str,
    resume: str | None = None,
    saver: str = "adapter",
    lightnings: bool = False,
    frozen_A: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with EFMLoRA, save into a folder, and return everything that must be equal at the end.

    With ``lightnings`` Lightning's own files are saved into its subfolder, too. With ``frozen_A`` the A factors are
    frozen at this multiple of their random start.
    """
    places = {folder: SAVERS[saver], **({f"{folder}/lightning": ModelCheckpoint} if lightnings else {})}
    files = [kind(place, filename="{step}", save_top_k=-1, every_n_train_steps=EVERY) for place, kind in places.items()]
    driver = EFMLoRA(CosineRho(RHO, 0.1), beta=BETA)
    trainer = trainer_of(strategy, [driver, *files], **settings)
    module = ShardedAutomatic(network())
    for name, p in module.named_parameters() if frozen_A is not None else ():
        if "lora_A" in name:
            p.requires_grad_(False).mul_(frozen_A)
    trainer.fit(module, loader(), ckpt_path=resume)
    return {
        "weights": full_weights(trainer.strategy, module.net),
        "optimizer": local_optimizer(trainer.optimizers[0]),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "driver": driver.state_dict(),
        "steps": trainer.global_step,
    }


def local(value: Any) -> Any:
    """This rank's own part of a value."""
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def local_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's part of the optimizer's state, without parameters of which it holds nothing."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    values = {}
    for i, parameter in enumerate(parameters):
        if local(parameter).numel():
            for key, value in optimizer.state.get(parameter, {}).items():
                values[f"{i}.{key}"] = local(value)
    return values
