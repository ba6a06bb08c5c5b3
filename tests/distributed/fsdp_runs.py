"""Runs that only sharding needs: other layers, checkpointed activations, gradients that overflow on one rank alone."""

import os
from typing import Any

import lightning as L
import torch
from fits import PRECISION_OF_FLOAT64, Sharded, ShardedAutomatic, parts
from float64_runs import RHO, dataset, fit_in_float64, network
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from peft import LoraConfig, get_peft_model
from strategies import WRAPPING, FSDPOnCPU, full_weights, places, strategy_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA, find_pairs


class Images(nn.Module):
    """Six features as a 6-pixel image: a convolution, a DoRA-able linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, (2, 2))
        self.hidden = nn.Linear(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.conv(x.view(-1, 1, 2, 3))).flatten(1)
        return self.head(torch.tanh(self.hidden(features)))


def images(use_dora: bool) -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["conv", "hidden"], use_dora=use_dora)
    return get_peft_model(Images(), config).double()


class Experts(nn.Module):
    """Two parameters of three experts, to which samples are routed; in many batches of a rank an expert has none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 8)), nn.Parameter(torch.randn(3, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0.3).long() + (x[:, 1] > 0)
        hidden = torch.tanh(torch.einsum("bi,boi->bo", x, self.up[which]))
        return torch.einsum("bi,boi->bo", hidden, self.down[which])


class Words(nn.Module):
    """Six features as six words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 5), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.abs() * 3).long().clamp(max=9)
        return self.head(torch.tanh(self.table(words)).flatten(1))


def embedding() -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(Words(), LoraConfig(r=2, lora_alpha=5, target_modules=["table", "head"])).double()


def experts() -> nn.Module:
    torch.manual_seed(3)
    targets: Any = {"target_modules": ["0"], "target_parameters": ["1.up", "1.down"]}
    return get_peft_model(nn.Sequential(nn.Linear(6, 8), Experts()), LoraConfig(r=2, lora_alpha=5, **targets)).double()


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in backward."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant: bool) -> nn.Module:
    net = network()
    layers = net.base_model.model
    for i in (0, 2, 4):
        layers[i] = Checkpointed(layers[i], use_reentrant)
    return net


NETWORKS = {
    "plain": network,
    "experts": experts,
    "embedding": embedding,
    "convolution": lambda: images(use_dora=False),
    "dora": lambda: images(use_dora=True),
    "checkpointed": lambda: checkpointed(use_reentrant=False),
    "checkpointed, reentrant": lambda: checkpointed(use_reentrant=True),
}


class Overflow(L.Callback):
    """One step's gradient of an A overflows, in what one rank holds of it."""

    def __init__(self, at_step: int, rank: int) -> None:
        self.at_step, self.rank = at_step, rank

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pairs = find_pairs(pl_module).pairs
        self.A = pairs[0 if self.rank == 0 else -1].A  # FSDP1 gives the first values of a unit to rank 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step != self.at_step:
            return
        grad = self.A.grad.to_local() if isinstance(self.A.grad, DTensor) else self.A.grad
        if trainer.global_rank == self.rank:
            assert grad is not None
            assert grad.numel() > 0
            grad.fill_(torch.inf)


class Recorder(L.Callback):
    """E after every optimizer step."""

    def __init__(self, flat: Any) -> None:
        self.flat, self.E = flat, []

    def on_train_batch_end(self, *args: Any) -> None:
        stacks = [stack.E.flatten() for stack in self.flat.perturbation._stacks]
        self.E.append(torch.cat(stacks).clone())


def train(strategy: str, front_end: str, net: str, batches: int) -> dict[str, Any]:
    """Train one of NETWORKS in float64 for some batches; the trained weights and E, whole."""
    model = NETWORKS[net]()
    module, callbacks, trainer = parts(front_end, model, accumulate=1)
    used = _fit(strategy, module, callbacks, limit_train_batches=batches, **trainer)
    return {"weights": full_weights(used, model), "E": callbacks[0].perturbation.state_dict()["E"]}


def overflow(strategy: str, front_end: str, estimator: str, rank: int) -> dict[str, Any]:
    """E after each step of a run in which one rank's part of a gradient overflows at step 2."""
    flat = {"EFMLoRA": EFMLoRA, "FMLoRA": FMLoRA}[front_end](RHO, estimator=estimator)
    recorder = Recorder(flat)
    _fit(strategy, ShardedAutomatic(network()), [Overflow(2, rank), flat, recorder], max_steps=5)
    return {"E": torch.stack(recorder.E)}


def scaled() -> dict[str, Any]:
    """EFMLoRA under FSDP2 with a loss scaler, whose first scale overflows: E after each step."""
    flat = EFMLoRA(RHO)
    recorder = Recorder(flat)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    x, y = dataset().tensors
    data = TensorDataset(100 * x.float(), y)
    trainer = {"plugins": plugin, "precision": None, "max_steps": 12}
    _fit("fsdp2", ShardedAutomatic(network().float()), [flat, recorder], data, **trainer)
    return {"E": torch.stack(recorder.E), "scale": scaler.get_scale()}


def alone(strategy: str, front_end: str, accumulate: int, precision: str, accelerator: str) -> dict[str, Any]:
    """Train in one process, on one device or under a sharding strategy of world size 1."""
    net = network().float()
    module, callbacks, trainer = parts(front_end, net, accumulate)
    used: Any = SingleDeviceStrategy(torch.device("cuda:0" if accelerator == "cuda" else "cpu"))
    if strategy == "fsdp1":
        kind = FSDPStrategy if accelerator == "cuda" else FSDPOnCPU
        used = kind(auto_wrap_policy=WRAPPING["layers"])
    elif strategy == "fsdp2":
        used = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    x, y = dataset().tensors
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=4)
    settings = {
        "precision": precision,
        "devices": 1,
        "accelerator": accelerator,
        "limit_train_batches": 9,  # odd: the last window of two is shorter
        "use_distributed_sampler": False,
        **trainer,
    }
    fit_in_float64(module, 1, callbacks, loader, strategy=used, **settings)
    driver = callbacks[0] if callbacks else getattr(module, "_callback", None)
    E = driver.perturbation.state_dict()["E"] if driver else {}
    return {"weights": {n: w.cpu() for n, w in full_weights(used, net).items()}, "E": E}


def validated(front_end: str, batches: int) -> dict[str, Any]:
    """Train three epochs under FSDP2 with one unit for all, after whose validation whole stand-ins stay in the modules.

    Args:
        front_end: see :func:`parts`.
        batches: of each validation.
    """
    net = network()
    module, callbacks, _ = parts(front_end, net, accumulate=1)
    loader = DataLoader(dataset(), batch_size=4)
    module.configure_model = lambda: fully_shard(net, mesh=module.device_mesh["data_parallel"])
    module.val_dataloader = lambda: loader
    module.validation_step = lambda batch, batch_idx: module.net(batch[0]).sum()
    used = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    limits = {"limit_train_batches": 4, "limit_val_batches": batches, "num_sanity_val_steps": batches}
    settings: dict[str, Any] = {"devices": 1, "strategy": used, "precision": "32-true", **limits}
    fit_in_float64(module, 3, callbacks, loader, **settings)
    return {"weights": full_weights(used, net)}


def _fit(strategy: str, module: Any, callbacks: list[Any], data: Any = None, **trainer: Any) -> Any:
    precision, double = PRECISION_OF_FLOAT64[strategy.partition("-")[0]]
    used = strategy_of(strategy, **double)
    loader = Sharded(data or dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    fit_in_float64(module, 1, callbacks, loader, strategy=used, **{"precision": precision, **places(), **trainer})
    return used
