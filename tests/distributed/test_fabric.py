"""Loops on two processes: with Fabric they equal the callbacks, with transformers they equal one process."""

import os
import warnings
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from fits import Sharded, own_share, shard
from float64_runs import RHO, dataset, network, optimizer_of, scheduler_of, trained
from helpers import same
from hf_runs import on_two_ranks, trained_by
from launch import Results, Runs, launch
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from loop_runs import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_flatlora import loops
from lightning_flatlora.loops.loop_method import STATE_KEY
from lightning_flatlora.sharding import Sharding, is_sharded

# -- Fabric


BATCHES = 6
RUNS = [("ddp", "EFMLoRA", 1), ("ddp", "EFMLoRA", 4), ("ddp", "FMLoRA", 4)]
RUNS += [("fsdp2", "EFMLoRA", 1), ("fsdp2", "EFMLoRA", 4), ("fsdp2", "FMLoRA", 4)]
OF_DDP = ("plain", "zero", "unused")


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


def whole(net: nn.Module) -> dict[str, Tensor]:
    """All trained weights in full."""
    return {name: Sharding().gather(p, p).clone() for name, p in net.named_parameters() if p.requires_grad}


def train(strategy: str, method: str, window: int = 1) -> dict[str, Any]:
    """Train on this rank's half of each batch; returns full trained weights and E, of the loop and of the callback."""
    fabric, net = fabric_of(strategy), network()
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(optimizer_of(model))
    flat = getattr(loops, method)(model, optimizer, RHO)
    # Under FSDP2 the ascent needs every micro-batch's gradient.
    blocks = strategy == "ddp" or method == "EFMLoRA"
    run(
        flat,
        model,
        optimizer,
        list(islice(own_share(), BATCHES)),
        window=window,
        backward=fabric.backward,
        no_sync=lambda accumulating: fabric.no_backward_sync(model, enabled=accumulating and blocks),
        scheduler=scheduler_of(optimizer),
    )
    E = flat.perturbation.state_dict()["E"]
    flat.close()
    weights = whole(net)
    callback = fits.train(strategy, method, window, epochs=1, batches=BATCHES)
    return {"loop": {"weights": weights, "E": E}, "callback": callback}


def resumed(folder: str) -> dict[str, Any]:
    """The weights of a run under FSDP2, and of one that is saved and resumed with a distributed checkpoint."""
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
            run(flat, model, optimizer, list(islice(own_share(), first, last)), backward=fabric.backward)
            if last < 6:
                fabric.save(folder, {**state, "flat": flat.state_dict()})
        ends.append(whole(net))
        flat.close()
    return {"whole": ends[0], "resumed": ends[1]}


class Skips(nn.Module):
    """Skips a LoRA layer in every second batch."""

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
    """Train in plain PyTorch under DDP, or on one process with the whole batches."""
    if ranks != 1:
        fabric_of("ddp")  # starts the process group
    ranks, rank = (1, 0) if ranks == 1 else (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    net = network()
    model: Any = Skips(net) if kind == "unused" else net
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "unused")
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(learned, lr=3e-3)
    if kind == "zero" and ranks > 1:
        # Not at the top, since the import itself warns.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(learned, torch.optim.AdamW, lr=3e-3)
    flat = loops.EFMLoRA(model, optimizer, RHO)
    run(flat, model, optimizer, list(islice(Sharded(dataset(), ranks, rank), BATCHES)))
    found: dict[str, Any] = {"weights": trained(net)}
    if kind == "zero" and ranks > 1:
        optimizer.consolidate_state_dict()
        found["keys"] = list(optimizer.state_dict()) if rank == 0 else []
    flat.close()
    return found


def by_accelerate() -> dict[str, Any]:
    """Train with accelerate, which shards the model by FSDP2 and gives the optimizer the new parameters."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # It would choose DDP, since it supports FSDP on accelerators only.
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    net = network()
    learned = [p for p in net.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(learned, lr=3e-3))
    flat = loops.EFMLoRA(model, optimizer, RHO)
    batches = list(islice(own_share(), BATCHES))
    run(flat, model, optimizer, batches, backward=accelerator.backward)
    weights = whole(net)
    flat.close()
    return {"weights": weights, "is_sharded": is_sharded(model)}


def sharded_later() -> None:
    """Shard a model after the loop's object was created."""
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


def unsynchronized() -> None:
    """Take an ascent whose gradients FSDP2 doesn't synchronize."""
    fabric, net = fabric_of("fsdp2"), network()
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(optimizer_of(model))
    flat = loops.FMLoRA(model, optimizer, RHO)
    x, _ = dataset().tensors
    with next(flat.training_passes()), fabric.no_backward_sync(model):
        fabric.backward(model(x[:2]).sum())


def static_graph() -> None:
    fabric_of("ddp")
    net = network()
    loops.FMLoRA(nn.parallel.DistributedDataParallel(net, static_graph=True), optimizer_of(net), RHO)


def two_dimensions() -> None:
    fabric_of("fsdp2")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    net = fully_shard(network(), mesh=mesh)
    loops.FMLoRA(net, optimizer_of(net), RHO)


REFUSED: dict[str, tuple[Any, str]] = {
    "a model that is sharded later": (sharded_later, "make it after the model is sharded"),
    "an ascent without gradients": (unsynchronized, "leave no_backward_sync"),
    "a static graph": (static_graph, "static_graph=True crashes"),
    "a mesh of two dimensions": (two_dimensions, "a model split over two dimensions"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {":".join(map(str, case)): partial(train, *case) for case in RUNS}
    runs |= {kind: partial(of_ddp, kind) for kind in OF_DDP}
    runs["resumed"] = partial(resumed, str(tmp_path_factory.mktemp("saved") / "run"))
    runs["accelerate"] = partial(by_accelerate)
    runs |= {what: partial(function) for what, (function, _) in REFUSED.items()}
    return launch(tmp_path_factory.mktemp("fabric"), runs)


@pytest.mark.parametrize(("strategy", "method", "window"), RUNS)
def test_two_ranks_equal_the_callback(results: Results, strategy: str, method: str, window: int) -> None:
    first, second = results[f"{strategy}:{method}:{window}"]
    assert same(first["loop"], second["loop"])
    for kind in ("weights", "E"):
        ours, theirs = list(first["loop"][kind].values()), list(first["callback"][kind].values())
        if (strategy, method, window) == ("fsdp2", "EFMLoRA", 4):
            # Fabric sends the sum of a window's gradients, Lightning's Trainer sends each gradient.
            assert max(float((one - other).norm()) for one, other in zip(ours, theirs, strict=True)) < 1e-12
        else:
            assert same(ours, theirs)
    assert all(float(E.norm()) > 0 for E in first["loop"]["E"].values())


def test_a_distributed_checkpoint_resumes_a_run(results: Results) -> None:
    """The checkpoint keeps nothing of ours in the optimizer's state; fabric.save stores the object's own state."""
    for rank in results["resumed"]:
        assert same(rank["whole"], rank["resumed"])


@pytest.mark.parametrize("kind", OF_DDP)
def test_ddp_equals_one_process(results: Results, kind: str) -> None:
    """Also with PyTorch's ZeroRedundancyOptimizer, and with layers that a batch leaves out."""
    first, second = results[kind]
    assert same(first["weights"], second["weights"])
    for name, value in of_ddp(kind, ranks=1)["weights"].items():
        assert float((value - first["weights"][name]).abs().max()) < 1e-12, name
    assert kind != "zero" or STATE_KEY in first["keys"]


def test_fsdp2_by_accelerate_equals_one_process(results: Results) -> None:
    first, second = results["accelerate"]
    assert first["is_sharded"]
    assert same(first, second)
    for name, value in of_ddp("plain", ranks=1)["weights"].items():
        assert float((value - first["weights"][name]).abs().max()) < 1e-12, name


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_work_is_refused(results: Results, what: str) -> None:
    assert all(REFUSED[what][1] in error for error in results.error(what))


# -- transformers


OF_TRANSFORMERS = list(product(("EFMLoRA", "FMLoRA"), (1, 2)))


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("transformers")
    out = str(folder / "out")
    return launch(
        folder, {f"{name}-{window}": partial(on_two_ranks, out, name, window) for name, window in OF_TRANSFORMERS}
    )


@pytest.mark.parametrize(("name", "window"), OF_TRANSFORMERS)
def test_two_ranks_of_transformers_equal_one(of_transformers: Results, tmp_path: Path, name: str, window: int) -> None:
    """The object is created before transformers wraps the model in DDP."""
    first, second = of_transformers[f"{name}-{window}"]
    assert first["wrapped"] == "DistributedDataParallel"
    assert same(first, second)
    trainer, flat = trained_by(name, tmp_path, gradient_accumulation_steps=window)
    weights = dict(trainer.model.net.named_parameters())
    for key, value in first["weights"].items():
        assert float((value - weights[key].detach()).abs().max()) < 1e-10, key
    E = flat.perturbation.state_dict()["E"]
    for key, value in first["E"].items():
        assert float(value.norm()) > 0
        assert torch.allclose(value, E[key], atol=1e-10), key
