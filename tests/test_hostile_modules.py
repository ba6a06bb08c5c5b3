"""Hostile modules under every front end: clean weights, equal to plain LoRA at rho 0, counted once, resumed."""

import atexit
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BASELINES,
    TWO_PASSES,
    E_hat,
    assert_no_trace,
    build,
    driver_of,
    fit,
    make_loader,
    same,
    weights,
    with_own,
)
from hostile_modules import EVERYWHERE, KINDS
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from shadows import Shadow, spy
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_flatlora import AdapterCheckpoint, loops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*BatchEncoding:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft 0.18's warning about experts
]
LOOPS = {"loops.EFMLoRA": loops.EFMLoRA, "loops.FMLoRA": loops.FMLoRA}
BATCHES, EPOCHS, RHO, LR = 3, 2, 0.5, 0.02
BETWEEN = {"on_train_batch_start", "on_train_batch_end", "on_save_checkpoint", "on_train_epoch_end", "step"}
"""Hooks in which no layer may read B + E."""


class Batches(Dataset[Any]):
    """Created again in each epoch, since steps may change them."""

    def __init__(self, title: str) -> None:
        self.title, self.batches = title, list(make_loader(BATCHES))

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return KINDS[self.title].as_batch([tensor.clone() for tensor in self.batches[index]])


def seed(step: int) -> None:
    torch.manual_seed(step)
    random.seed(step)
    np.random.seed(step)


class Seeds(Callback):
    """Seeds each batch by its number in the run, so that a resumed run draws what it would have drawn."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        seed(trainer.current_epoch * BATCHES + batch_idx)


@dataclass
class Run:
    """The final state of a run.

    Attributes:
        weights: all parameters.
        stored: the state dict.
        written: buffers, metrics, the module's own containers, the generator's state and the logged values.
        seen: what the passes of each batch depended on.
        method: the step count and E.
    """

    weights: dict[str, Any]
    stored: dict[str, Any]
    written: list[Any]
    seen: dict[float, set[Any]]
    method: Any


def result(module: Any, driver: Any, logged: dict[str, Any]) -> Run:
    assert_no_trace(module)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    metrics = [(each.update_count, each.metric_state) for each in module.modules() if isinstance(each, Metric)]
    seen: dict[float, set[Any]] = {}
    for index, *witness in module.seen:
        seen.setdefault(index, set()).add(tuple(witness))
    method = None if driver is None else (driver.step, E_hat(driver))
    return Run(
        weights(module),
        {name: value.clone() for name, value in module.state_dict().items()},
        [buffers, metrics, module.own, torch.get_rng_state(), logged],
        seen,
        method,
    )


def by_trainer(title: str, front_end: str, rho: float, lr: float, folder: Path, resume: Path | None = None) -> Run:
    kind = KINDS[title]
    is_ours = front_end not in ("plain", *BASELINES)
    settings = dict(kind.settings) if is_ours else {}
    if front_end == "efmlora+module":
        settings["every_n_steps"] = 1 if lr == 0 else 2
    module, callbacks, more = build(front_end, rho, net=kind.net(), own=kind.own, lr=lr, **settings)
    if lr == 0:
        module.optimizer_class = torch.optim.SGD
    looks = is_ours and rho > 0 and lr > 0 and resume is None
    if looks:
        shadow = Shadow(module.net, trained_only=title == "MultiheadAttention")
        module.optimizer_class = shadow.optimizer_class()
        module.inside.append(lambda *_: shadow.look("module", "training_step"))
        callbacks = [spy(shadow, "Before"), *callbacks, spy(shadow, "After")]
    files = {"filename": "{epoch}", "save_top_k": -1}
    saver = AdapterCheckpoint(folder, **files) if kind.saves_adapters else ModelCheckpoint(folder, **files)
    loader = DataLoader(Batches(title), batch_size=None, collate_fn=lambda batch: batch)
    callbacks = [Seeds(), *callbacks, saver]
    trainer = fit(folder, module, callbacks, loader, max_epochs=EPOCHS, ckpt_path=resume, **more)
    if looks:
        assert {"training_step", "on_after_backward", *BETWEEN} <= shadow.seen.keys()
        assert not shadow.seen.get("perturbed", set()) & BETWEEN
    driver = driver_of(trainer) if is_ours else None
    return result(module, driver, dict(trainer.callback_metrics))


def by_loop(title: str, front_end: str, rho: float, lr: float, folder: Path, resume: Path | None = None) -> Run:
    kind = KINDS[title]
    module = with_own(kind.own)[0](net=kind.net(), lr=lr)
    if lr == 0:
        module.optimizer_class = torch.optim.SGD
    optimizer = module.configure_optimizers()
    flat = LOOPS[front_end](module, optimizer, rho, **kind.settings)
    if resume:
        saved = torch.load(resume)
        module.load_state_dict(saved["module"], strict=module.strict_loading)
        optimizer.load_state_dict(saved["optimizer"])
    shadow = Shadow(module.net, trained_only=title == "MultiheadAttention")
    module.inside.append(lambda *_: shadow.look("loop", "inside of a pass"))
    batches = Batches(title)
    for epoch in range(1 if resume else 0, EPOCHS):
        for index in range(BATCHES):
            seed(epoch * BATCHES + index)
            for each_pass in flat.training_passes():
                with each_pass:
                    module.loss(batches[index], index).backward()
                shadow.look("loop", "between passes")
            optimizer.step()
            shadow.take()
            optimizer.zero_grad()
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"epoch={epoch}.ckpt")
    flat.close()
    return result(module, flat, {})


FOLDER = TemporaryDirectory()
# Explicitly, since Python warns if it has to remove the folder itself.
atexit.register(FOLDER.cleanup)


@cache
def trained(title: str, front_end: str, rho: float = RHO, lr: float = LR) -> Run:
    """Train a kind of module under a front end, only once for all tests."""
    folder = Path(FOLDER.name) / title / f"{front_end} {rho} {lr}"
    folder.mkdir(parents=True, exist_ok=True)
    run = by_loop if front_end in LOOPS else by_trainer
    return run(title, front_end, rho, lr, folder)


def resumed(title: str, front_end: str) -> Run:
    folder = Path(FOLDER.name) / title / f"{front_end} {RHO} {LR}"
    run = by_loop if front_end in LOOPS else by_trainer
    return run(title, front_end, RHO, LR, folder, folder / "epoch=0.ckpt")


def cases(only: tuple[str, ...] = (*EVERYWHERE, *BASELINES), alike_too: bool = True) -> Any:
    """Each kind under its front ends; kinds whose run equals another kind's can be left out."""
    found = []
    for title, kind in KINDS.items():
        if alike_too or kind.like is None:
            found += [(title, front_end) for front_end in kind.front_ends if front_end in only]
    return pytest.mark.parametrize(("title", "front_end"), found)


@cases(EVERYWHERE, alike_too=False)
def test_plain_at_rho_0(title: str, front_end: str) -> None:
    """Bit for bit; at another rho the run differs."""
    plain, zero = trained(title, "plain"), trained(title, front_end, 0.0)
    assert same(zero.weights, plain.weights)
    assert same(zero.stored, plain.stored)
    assert not same(trained(title, front_end).weights, plain.weights)


@cases(EVERYWHERE)
def test_clean(title: str, front_end: str) -> None:
    """The shadow is compared within the run: in all hooks, in each pass, and in the optimizer's step."""
    assert trained(title, front_end).method[0] == BATCHES * EPOCHS


@cases((*TWO_PASSES, "efmlora+module", "loops.FMLoRA"))
def test_counted_once(title: str, front_end: str) -> None:
    """Each pass starts from the same state as a plain run's, and only the first pass leaves changes."""
    plain, ours = trained(title, "plain", lr=0.0), trained(title, front_end, lr=0.0)
    assert ours.seen == plain.seen
    logged = len(plain.written) - 1 if front_end in LOOPS else len(plain.written)
    assert same(ours.written[:logged], plain.written[:logged])


@cases(EVERYWHERE, alike_too=False)
def test_resumed(title: str, front_end: str) -> None:
    whole, again = trained(title, front_end), resumed(title, front_end)
    assert same(again.stored, whole.stored)
    assert same(again.method, whole.method)


@cases(EVERYWHERE)
def test_it_trains_as_what_it_is_like(title: str, front_end: str) -> None:
    """Checkpointing, the class of a batch, and a loop instead of a Trainer don't change a bit."""
    ours = trained(title, front_end)
    if KINDS[title].like is not None:
        other = trained(KINDS[title].like, front_end)
        assert same(list(ours.weights.values()), list(other.weights.values()))
    if front_end in LOOPS:
        callback = trained(title, {"loops.EFMLoRA": "efmlora", "loops.FMLoRA": "fmlora"}[front_end])
        assert same(ours.weights, callback.weights)
        assert same(list(ours.method[1].values()), list(callback.method[1].values()))
