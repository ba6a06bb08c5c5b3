"""EFMLoRA in a loop with DeepSpeed's engine on two processes, against the same loop under DDP."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from float64_runs import RHO, dataset, loss, network, optimizer_of
from loop_runs import method_of
from torch import Tensor, nn

from lightning_flatlora import LearningRateRho, loops

os.environ["DS_ACCELERATOR"] = "cpu"  # read as deepspeed is imported

STEPS, SIZE = 6, 4
FILE = "flat"


def float32_network() -> nn.Module:
    # In float32, since DeepSpeed assembles gradients in it.
    return network().float()


def batches(window: int) -> list[Any]:
    """This rank's share of each batch."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    x, y = dataset().tensors
    shares = []
    for index in range(STEPS * window):
        rows = slice(rank + index * SIZE, (index + 1) * SIZE, ranks)
        shares.append((x[rows].float(), y[rows]))
    return shares


def engine_of(stage: int, window: int = 1, net: nn.Module | None = None, **zero: Any) -> Any:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    net = float32_network() if net is None else net
    config = {
        "train_micro_batch_size_per_gpu": SIZE // 2,
        "gradient_accumulation_steps": window,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW is compiled where it runs
    }
    return deepspeed.initialize(model=net, optimizer=optimizer_of(net), config=config)[0]


def step_of(engine: Any, batch: Any, flat: Any) -> None:
    with torch.enable_grad() if flat is None else flat.training_pass():
        engine.backward(loss(engine, batch))
    if flat is not None:
        flat.before_step()
    engine.step()


def state_of(net: nn.Module, flat: Any = None) -> dict[str, Any]:
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    return {"weights": weights, "E": {} if flat is None else flat.perturbation.state_dict()["E"]}


def train(stage: int, window: int = 1, rho: float | None = None) -> dict[str, Any]:
    """``rho`` None takes the schedule of the other tests' loops; negative trains plain LoRA."""
    engine = engine_of(stage, window)
    flat = None if rho is not None and rho < 0 else method_of("EFMLoRA", engine, engine.optimizer, rho)
    for batch in batches(window):
        step_of(engine, batch, flat)
    trained = state_of(engine.module, flat)
    if flat is not None:
        assert flat.step == STEPS
        flat.close()
    return trained


def ddp(window: int = 1) -> dict[str, Any]:
    net = float32_network()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model, optimizer = nn.parallel.DistributedDataParallel(net), optimizer_of(net)
    flat = method_of("EFMLoRA", model, optimizer)
    for index, batch in enumerate(batches(window)):
        with flat.training_pass():
            (loss(model, batch) / window).backward()
        if (index + 1) % window == 0:
            flat.before_step()
            optimizer.step()
            optimizer.zero_grad()
    trained = state_of(net, flat)
    flat.close()
    return trained


def resume(stage: int, folder: str) -> dict[str, Any]:
    """A run that is stopped after half of its steps, and continued by another engine."""
    data = batches(1)
    engine = engine_of(stage)
    flat = method_of("EFMLoRA", engine, engine.optimizer)
    for batch in data[: STEPS // 2]:
        step_of(engine, batch, flat)
    engine.save_checkpoint(folder, client_state={FILE: flat.state_dict()})
    flat.close()
    engine = engine_of(stage)
    flat = method_of("EFMLoRA", engine, engine.optimizer)
    _, client_state = engine.load_checkpoint(folder)
    flat.load_state_dict(client_state[FILE])
    for batch in data[STEPS // 2 :]:
        step_of(engine, batch, flat)
    trained = state_of(engine.module, flat)
    flat.close()
    return trained


def clean_and_finite(stage: int) -> dict[str, Any]:
    """The stored B in a pass and after it; and Ê after a gradient that is not finite, of a parameter outside."""
    engine = engine_of(stage)
    flat = method_of("EFMLoRA", engine, engine.optimizer)
    first, second, third, *_ = batches(1)
    step_of(engine, first, flat)
    pair = flat.perturbation.pairs[0]
    stored: list[Tensor] = []
    read: list[Tensor] = []
    with flat.training_pass():
        stored.append(pair.B.detach().clone())
        read.append(pair.readers[0].weight.detach().clone())
        engine.backward(loss(engine, second))
    stored.append(pair.B.detach().clone())
    flat.before_step()
    engine.step()
    before = flat.perturbation.state_dict()["E"]
    head = engine.module.base_model.model[6].modules_to_save["default"]
    hook = head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with flat.training_pass():
        engine.backward(loss(engine, third))
    flat.before_step()
    hook.remove()
    after = flat.perturbation.state_dict()["E"]
    flat.close()
    return {"stored": stored, "read": read, "before": before, "after": after}


def radius(stage: int) -> dict[str, Any]:
    """A radius that follows the learning rate, which a scheduler changes in the engine's own groups."""
    engine = engine_of(stage)
    flat = method_of("EFMLoRA", engine, engine.optimizer, LearningRateRho(RHO))
    radii = []
    for batch in batches(1)[:2]:
        radii.append(flat.current_rho)
        step_of(engine, batch, flat)
        engine.optimizer.param_groups[0]["lr"] /= 2
    flat.close()
    return {"radii": radii}


def program_of_the_page() -> dict[str, Any]:
    page = (Path(__file__).parents[2] / "docs" / "other_loops.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(import deepspeed.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(programs[0], names)
    saved = names["engine"].load_checkpoint("run")[1]["flat"]
    names["flat"].close()
    return {"step": saved["step"]}


def refused(folder: str) -> dict[str, Any]:
    """What is said to stages and methods that can't be exact, to a step without before_step, and to wrappers."""
    said = []

    def attempt(make: Any) -> None:
        try:
            make()
        except Exception as error:
            said.append(str(error))

    attempt(lambda: loops.EFMLoRA(engine_of(3), None, 0.1))  # type: ignore[arg-type]
    engine = engine_of(1)
    attempt(lambda: loops.FMLoRA(engine, engine.optimizer, 0.1))
    attempt(lambda: loops.EFMLoRA(nn.Sequential(engine), engine.optimizer, 0.1))
    flat = method_of("EFMLoRA", engine, engine.optimizer)
    batch = batches(1)[0]
    with flat.training_pass():
        engine.backward(loss(engine, batch))
    attempt(engine.step)
    flat.close()
    assert Path(folder).is_dir()
    return {"said": said}
