"""One run of the demo: an adapter trained at one rate, its losses, and the loss around its weights."""

import gc
import multiprocessing
import platform
import signal
import time
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.flatness import MeanLoss, adversarial_direction, loss_along_line, loss_gradient, trained_factors
from recipes.command_line.progress import quiet
from recipes.demo.data import Batch, evaluation_batches
from recipes.demo.encoder import CutEncoder
from recipes.demo.module import TaskClassifier
from recipes.demo.training import Settings, kept, on_one_thread, trained
from recipes.offline import texts
from recipes.studies.process import commit
from recipes.studies.rows import Row

LORA, WITH_DROPOUT, EFMLORA = "LoRA", "LoRA, dropout 0.9", "EFMLoRA, rho 32"
ARMS: dict[str, dict[str, Any]] = {LORA: {}, WITH_DROPOUT: {"dropout": 0.9}, EFMLORA: {"rho": 32.0}}
"""LoRA, a change of it that costs nothing, and EFMLoRA; dropout and rho were chosen with another seed."""

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (40, 41, 42, 43)
"""Seeds with which neither dropout nor rho was chosen."""

DISTANCES = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0)
"""Distances from the weights, along the steepest direction that B can express, in the full weights' units."""


class DemoRun(NamedTuple):
    """One training run.

    Attributes:
        arm: one of :data:`ARMS`.
        rate: AdamW's highest learning rate.
        seed: for the examples, the adapter's start, the order of the batches, and dropout.
        settings: the demo's.
    """

    arm: str
    rate: float
    seed: int
    settings: Settings

    def key(self) -> Row:
        """Return the first entries of its row."""
        return {"arm": self.arm, "rate": self.rate, "seed": self.seed, "settings": asdict(self.settings)}


def begin() -> None:
    """Prepare a process for runs; only the first process handles Ctrl-C, and the others end with it."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    on_one_thread()


def perform(run: DemoRun) -> Row:
    """Train, and measure on the validation part in float32.

    Returns:
        A JSON line: the run's key; ``validation_loss`` in nats; ``losses_around``, the validation loss at each of
        :data:`DISTANCES`; and the run's cost, machine and versions.
    """
    gc.collect()  # frees the last run's models, whose parts refer to each other
    began = time.perf_counter()
    settings = run.settings
    encoder = kept(settings.frozen_layers, settings.length)
    module = trained(settings, encoder, run.seed, {**ARMS[run.arm], "learning_rate": run.rate})
    seconds = time.perf_counter() - began
    losses = _losses_around(module.eval(), _held_out(encoder, settings.task))
    return {
        **run.key(),
        "validation_loss": losses[0],
        "losses_around": losses,
        "seconds": seconds,
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


@cache
def _held_out(encoder: CutEncoder, task: str) -> list[Batch]:
    return evaluation_batches(texts.parts(task)["validation"], encoder.states)


def _losses_around(module: TaskClassifier, batches: list[Batch]) -> list[float]:
    """Return the mean loss of batches at :data:`DISTANCES` along their own steepest direction."""
    loss, pairs = _loss(module, batches), find_pairs(module).pairs
    direction = adversarial_direction(Perturbation(pairs), loss_gradient(loss, trained_factors(pairs)))
    found: list[float] = loss_along_line(loss, pairs, direction, torch.tensor(DISTANCES)).tolist()
    return found


def _loss(module: TaskClassifier, batches: list[Batch]) -> MeanLoss:
    """Return the mean over the batches, each weighted by its number of texts."""
    texts_in_all = sum(len(batch["labels"]) for batch in batches)
    share = len(batches) / texts_in_all
    losses = []
    for batch in batches:

        def one(batch: Batch = batch) -> Tensor:
            return module.loss(batch) * len(batch["labels"]) * share

        losses.append(one)
    return MeanLoss(losses)
