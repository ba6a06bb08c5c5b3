"""The methods in a loop under Fabric, on two processes, against the callbacks under the same strategy."""

import os
import warnings
from itertools import islice
from typing import Any

import fits
import lightning as L
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from fits import Sharded
from float64_runs import RHO, dataset, network, optimizer_of, scheduler_of
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from loop_runs import run
from strategies import shard
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_flatlora import loops
from lightning_flatlora.sharding import Sharding, is_sharded

BATCHES = 6


def fabric_of(strategy: str) -> L.Fabric:
    ranks = int(os.environ["WORLD_SIZE"])
    if strategy == "ddp":
        kind: Any = DDPStrategy(process_group_backend="gloo")
    else:
        sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
        kind = ModelParallelStrategy(shard, process_group_backend="gloo", **sizes)  # type: ignore[arg-type]
    fabric = L.Fabric(accelerator="cpu", devices=ranks, strategy=kind)
    fabric.launch()
    return fabric


def train(strategy: str, method: str, window: int = 1) -> dict[str, Any]:
    """Train on this rank's half of each batch; the trained weights and E, whole, of the loop and of the callback."""
    fabric, net = fabric_of(strategy), network()
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(optimizer_of(model))
    flat = getattr(loops, method)(model, optimizer, RHO)
    loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    # Under FSDP2 the ascent needs every micro-batch's gradient.
    blocks = strategy == "ddp" or method == "EFMLoRA"
    run(
        flat,
        model,
        optimizer,
        list(islice(loader, BATCHES)),
        window=window,
        backward=fabric.backward,
        no_sync=lambda accumulating: fabric.no_backward_sync(model, enabled=accumulating and blocks),
        scheduler=scheduler_of(optimizer),
    )
    E = flat.perturbation.state_dict()["E"]
    flat.close()
    weights = {name: Sharding().gather(p, p).clone() for name, p in net.named_parameters() if p.requires_grad}
    callback = fits.train(strategy, method, window, epochs=1, batches=BATCHES)
    return {"loop": {"weights": weights, "E": E}, "callback": callback}


def resumed(folder: str) -> dict[str, Any]:
    """The weights of a run under FSDP2, and of one that is saved and resumed by a distributed checkpoint."""
    ends = []
    for parts in ([(0, 6)], [(0, 3), (3, 6)]):
        for first, last in parts:
            fabric, net = fabric_of("fsdp2"), network()
            model = fabric.setup_module(net)
            optimizer = fabric.setup_optimizers(optimizer_of(model))
            flat = loops.EFMLoRA(model, optimizer, RHO)
            state = {"model": model, "optimizer": optimizer, "flat": flat.state_dict()}
            if first > 0:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "the optimizer's state has none of EFMLoRA")
                    fabric.load(folder, state)
                assert flat.step == 0
                flat.load_state_dict(state["flat"])
            loader = Sharded(dataset(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
            run(flat, model, optimizer, list(islice(loader, first, last)), backward=fabric.backward)
            if last < 6:
                fabric.save(folder, {**state, "flat": flat.state_dict()})
        ends.append({name: Sharding().gather(p, p).clone() for name, p in net.named_parameters() if p.requires_grad})
        flat.close()
    return {"whole": ends[0], "resumed": ends[1]}


class Skips(nn.Module):
    """Leaves a LoRA layer out of each second batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.net.base_model.model  # type: ignore[union-attr]
        self.calls += 1
        for index, layer in enumerate(layers):
            if index != 2 or self.calls % 2:
                x = layer(x)
        return x


def of_ddp(kind: str, ranks: int | None = None) -> dict[str, Any]:
    """Plain PyTorch under DDP, or on one process with the whole batches."""
    if ranks != 1:
        fabric_of("ddp")  # starts the processes' group
    ranks, rank = (1, 0) if ranks == 1 else (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    net = network()
    model: Any = Skips(net) if kind == "unused" else net
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "unused")
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=3e-3)
    if kind == "zero" and ranks > 1:
        # Not at the top, since the import warns, of itself.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=3e-3)
    flat = loops.EFMLoRA(model, optimizer, RHO)
    run(flat, model, optimizer, list(islice(Sharded(dataset(), ranks, rank), BATCHES)))
    found: dict[str, Any] = {"weights": {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}}
    if kind == "zero" and ranks > 1:
        optimizer.consolidate_state_dict()
        found["keys"] = list(optimizer.state_dict()) if rank == 0 else []
    flat.close()
    return found


def by_accelerate() -> dict[str, Any]:
    """Accelerate, which shards the model by FSDP2 and gives the optimizer the new parameters."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # It would take DDP, since it knows FSDP on accelerators only.
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    net = network()
    trained = [p for p in net.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(trained, lr=3e-3))
    flat = loops.EFMLoRA(model, optimizer, RHO)
    batches = list(islice(Sharded(dataset(), ranks, rank), BATCHES))
    run(flat, model, optimizer, batches, backward=accelerator.backward)
    weights = {name: Sharding().gather(p, p).clone() for name, p in net.named_parameters() if p.requires_grad}
    flat.close()
    return {"weights": weights, "is_sharded": is_sharded(model)}


def sharded_later() -> dict[str, Any]:
    """A loop whose model is sharded after the object was made."""
    fabric_of("fsdp2")
    net = network()
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, RHO)
    fully_shard(net)
    net(dataset().tensors[0][:2]).sum().backward()
    try:
        optimizer.step()
    finally:
        flat.close()
    return {}


def unsynchronized() -> dict[str, Any]:
    """An ascent that FSDP2 keeps back."""
    fabric, net = fabric_of("fsdp2"), network()
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(optimizer_of(model))
    flat = loops.FMLoRA(model, optimizer, RHO)
    x, _ = dataset().tensors
    with next(flat.training_passes()), fabric.no_backward_sync(model):
        fabric.backward(model(x[:2]).sum())
    return {}


def refused() -> dict[str, Any]:
    """What the loops say to DDP's static graph, and to a mesh of two dimensions."""
    said = []
    for static, rows in ((True, None), (False, (2, 1))):
        net = network()
        model: Any = net
        if static:
            model = nn.parallel.DistributedDataParallel(net, static_graph=True)
        else:
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", rows, mesh_dim_names=("replicas", "shards"))
            fully_shard(net, mesh=mesh)
        try:
            loops.FMLoRA(model, optimizer_of(net), RHO)
        except Exception as error:
            said.append(str(error))
    return {"said": said}
