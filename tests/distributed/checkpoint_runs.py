"""Runs on one or several processes that write and read checkpoints; each rank returns what it ends with."""

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from communication_runs import Collectives
from fits import ShardedAutomatic
from float64_runs import BETA, RHO, dataset, network
from helpers import ResumableLoader, same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import fsdp
from peft import LoraConfig, get_peft_model
from strategies import full_weights, places, strategy_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lightning_flatlora import AdapterCheckpoint, CosineRho, EFMLoRA
from lightning_flatlora.sharding import is_sharded, sharding_of

BATCHES, EPOCHS, EVERY = 6, 2, 3
MIDDLE, END = 9, BATCHES * EPOCHS
"""Optimizer steps: in the middle of the second epoch, and the last."""


SAVERS = {"adapter": AdapterCheckpoint, "lightning": ModelCheckpoint}


def full_state_on_cpu(module: Any, world_size: int, rank0_only: bool = True) -> Any:
    """Lightning's context without offloading, which on the CPU gives views of memory that FSDP1 frees or uses again."""
    choice = {"offload_to_cpu": False, "rank0_only": rank0_only}
    configs = FullStateDictConfig(**choice), FullOptimStateDictConfig(**choice)
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)


fsdp._get_full_state_dict_context = full_state_on_cpu  # type: ignore[attr-defined]


def loader(size: int = 4) -> ResumableLoader:
    """Shuffled batches; this rank's share of each."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    x, y = dataset().tensors
    batches = []
    for start in range(0, BATCHES * size, size):
        own = slice(start + rank, start + size, ranks)
        batches.append((x[own], y[own]))
    return ResumableLoader(batches)


def trainer_of(strategy: str, callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    """A quiet Trainer; "single" is one process without a strategy."""
    settings = {"max_epochs": EPOCHS, **settings}
    if strategy != "single":
        double = {"double": True} if strategy.startswith("fsdp1") else {}
        kind = strategy_of(strategy, **double, **settings.pop("strategy_settings", {}))
        settings |= {"strategy": kind, **places()}
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
    """Train with EFMLoRA, save into a folder, and return everything that must be equal in the end.

    With ``lightnings`` Lightning's own files are saved into its subfolder, too. With ``frozen_A`` the A factors stay at
    that number times what they were drawn at.
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
    """What this rank alone holds."""
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def local_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's part of an optimizer's state, of parameters that it has a part of."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    values = {}
    for i, parameter in enumerate(parameters):
        if local(parameter).numel():
            for key, value in optimizer.state.get(parameter, {}).items():
                values[f"{i}.{key}"] = local(value)
    return values


def apart(folder: str, strategy: str, resumes: list[str | None], **settings: Any) -> dict[str, Any]:
    """Each rank resumes from a file of its own, or from none, as if machines shared no folder."""
    return train(folder, strategy, resume=resumes[int(os.environ["RANK"])], **settings)


class Wide(nn.Module):
    """A frozen base much larger than the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 500), nn.Linear(500, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))[:, :3]


def traffic(folder: str, strategy: str, **settings: Any) -> dict[str, int]:
    """The largest tensor in the collectives while a checkpoint is saved and loaded, of the factors and of the base."""
    largest = {}

    def counted(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Collectives() as mode:
                result = action(*args, **kwargs)
            largest[name] = mode.largest
            return result

        return run

    def trainer(where: str, steps: int) -> Any:
        save: Any = AdapterCheckpoint(where, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        save._save_checkpoint = counted("save", save._save_checkpoint)
        return trainer_of(strategy, [EFMLoRA(RHO), save], max_steps=steps, **settings)

    first = wide_module()
    factor = max(p.nbytes for p in first.parameters() if p.requires_grad)
    base = max(p.nbytes for p in first.parameters())
    trainer(folder, 1).fit(first, loader())
    resumed = trainer(folder + "-2", 2)
    connector = resumed._checkpoint_connector
    connector._restore_modules_and_callbacks = counted("load", connector._restore_modules_and_callbacks)
    resumed.fit(wide_module(), loader(), ckpt_path=f"{folder}/step=1.ckpt")
    return {**largest, "factor": factor, "base": base}


def wide_module() -> ShardedAutomatic:
    torch.manual_seed(0)
    net = get_peft_model(Wide(), LoraConfig(r=2, target_modules=["first", "last"])).double()
    return ShardedAutomatic(net)


def gathered(kind: str) -> dict[str, Any]:
    """What is made whole of a model of which only a part is sharded, as a configure_model may have done it."""
    torch.manual_seed(0)
    inner, scale = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), nn.Parameter(torch.ones(7))
    with torch.no_grad():
        inner[0].bias.fill_(-0.0)  # which a sum over the ranks would turn into 0.0
    expected = {name: p.detach().clone() for name, p in inner.named_parameters()}
    if kind == "fsdp1":
        unit: Any = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        unit = fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    model = nn.ModuleDict({"unit": unit})
    model.register_parameter("scale", scale)
    layout = sharding_of(model)
    found = {name: layout.gather(p, p) for name, p in inner.named_parameters()}
    parts = [same(local(layout.part(found[name], p)), local(p)) for name, p in inner.named_parameters()]
    return {
        "expected": expected,
        "found": found,
        "parts": all(parts),
        "whole": torch.equal(layout.gather(scale, scale), scale) and not layout.splits(scale),
        "sharded": is_sharded(model),
    }


def odd_optimizer(folder: str, strategy: str) -> dict[str, Any]:
    """An optimizer that keeps something else than a number or the parameter's size of a sharded parameter."""

    class Odd(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            for state in trainer.optimizers[0].state.values():
                state["history"] = torch.zeros(1000)

    save = AdapterCheckpoint(folder, every_n_train_steps=1)
    trainer_of(strategy, [Odd(), save], max_steps=1).fit(ShardedAutomatic(network()), loader())
    return {}
