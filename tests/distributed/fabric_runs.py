"""The methods in a loop under Fabric, on two processes, against the callbacks under the same strategy."""

import os
from itertools import islice
from typing import Any

import fits
import lightning as L
import torch
from fits import Sharded
from float64_runs import RHO, dataset, network, optimizer_of, scheduler_of
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from loop_runs import run
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_flatlora import loops
from lightning_flatlora.distributed import Layout

BATCHES = 6


def shard(net: nn.Module, device_mesh: Any) -> nn.Module:
    mesh = device_mesh["data_parallel"]
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


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
    weights = {name: Layout().gather(p, p).clone() for name, p in net.named_parameters() if p.requires_grad}
    callback = fits.train(strategy, method, window, epochs=1, batches=BATCHES)
    return {"loop": {"weights": weights, "E": E}, "callback": callback}


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
