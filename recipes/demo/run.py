"""One run of the demo: an adapter trained at one rate, its losses, and the loss around its weights."""

import gc
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import transformers
from torch import Tensor

from lightning_flatlora import EFMLoRA, Perturbation, find_pairs
from lightning_flatlora.flatness import (
    MeanLoss,
    adversarial_direction,
    loss_along_line,
    loss_gradient,
    trained_factors,
)
from recipes.demo.data import Batch, evaluation_batches, training_batches
from recipes.demo.encoder import CutEncoder, load
from recipes.demo.module import TaskClassifier
from recipes.language import texts
from recipes.shared.ledger import Ledger, Row, commit, entries
from recipes.shared.mistakes import without_traceback
from recipes.shared.precision import Precision, fast_precision
from recipes.shared.progress import quiet
from recipes.shared.training import BARE

LORA, WITH_DROPOUT, EFMLORA = "LoRA", "LoRA, dropout 0.9", "EFMLoRA"
ARMS: dict[str, dict[str, Any]] = {LORA: {}, WITH_DROPOUT: {"dropout": 0.9}, EFMLORA: {"rho": 32.0}}
"""LoRA, a change of it that costs nothing, and EFMLoRA, with the rho and dropout that docs/study.md chose."""

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (40, 41, 42)
"""On which nothing was chosen."""

DISTANCES = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0)
"""From the weights, along the steepest direction that B can express, in the full weights' units."""

_load = cache(load)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run beside its method, rate and seed.

    Attributes:
        task: of the packaged texts.
        frozen_layers: of the encoder.
        length: tokens kept of a text.
        shots: training examples of a class.
        steps: of training.
        batch_size: texts of a step.
        precision: of training.
    """

    task: str = "all_subjects"
    frozen_layers: int = 5
    length: int = 32
    shots: int = 16
    steps: int = 600
    batch_size: int = 8
    precision: Precision = field(default_factory=fast_precision)


class Run(NamedTuple):
    """One training.

    Attributes:
        arm: one of :data:`ARMS`.
        rate: AdamW's at its highest.
        seed: of the examples, the adapter's start, the order of the batches, and dropout.
        settings: of the demo.
    """

    arm: str
    rate: float
    seed: int
    settings: Settings

    def __str__(self) -> str:
        return f"{self.arm}, learning rate {self.rate:g}, seed {self.seed}"

    def key(self) -> Row:
        """The first entries of its row."""
        return {"arm": self.arm, "rate": self.rate, "seed": self.seed, "settings": asdict(self.settings)}


def ledger(folder: Path) -> Ledger:
    """The ``results.jsonl`` of the runs in a folder."""
    return Ledger(folder / "results.jsonl", entries("arm", "rate", "seed", "settings"))


def share(folder: Path, runs: list[Run]) -> None:
    """Do runs until each is done, or another process does it."""
    quiet()
    transformers.utils.logging.set_verbosity_error()  # of the pooler, which the encoder leaves out
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the next core is another process's
    done = ledger(folder)

    def report(run: Run) -> None:
        print(f"[{runs.index(run) + 1}/{len(runs)}] {run}", flush=True)

    while done.perform_first([run for run in runs if done.find(run) is None], perform, report):
        done.reload()


def assist(folder: Path, runs: list[Run]) -> None:
    """Do :func:`share` in a process of its own, which leaves it to the first one to say how it ended."""
    with without_traceback(), suppress(KeyboardInterrupt):
        share(folder, runs)


def perform(run: Run) -> Row:
    """Train, and measure on the validation part in float32.

    Returns:
        A JSON line: the run's key; ``validation_loss`` in nats and ``validation_accuracy``; ``losses_around``, the
        validation loss at each of :data:`DISTANCES`; ``train_loss``; and what the run took, where, and with which
        versions.
    """
    gc.collect()  # the last run's models: their parts point at each other
    began = time.perf_counter()
    encoder = _load(run.settings.frozen_layers, run.settings.length)
    examples = texts.shots(run.settings.task, run.settings.shots, run.seed)
    module = _trained(run, encoder, examples)
    seconds = time.perf_counter() - began
    module.eval()
    held_out = _held_out(encoder, run.settings.task)
    losses = _losses_around(module, held_out)
    train = _loss(module, evaluation_batches(examples, encoder.states))
    return {
        **run.key(),
        "validation_loss": losses[0],
        "validation_accuracy": module.accuracy(held_out),
        "losses_around": losses,
        "train_loss": train().item(),
        "seconds": seconds,
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


def _trained(run: Run, encoder: CutEncoder, examples: list[texts.Example]) -> TaskClassifier:
    settings, config = run.settings, dict(ARMS[run.arm])
    rho = config.pop("rho", None)
    L.seed_everything(run.seed, verbose=False)
    module = TaskClassifier(encoder, len(texts.TASKS[settings.task].classes), learning_rate=run.rate, **config)
    trainer = L.Trainer(
        # The kept states lie in the main memory, and steps are too small for a GPU to be faster.
        accelerator="cpu",
        precision=settings.precision,
        max_epochs=1,
        callbacks=[EFMLoRA(rho)] if rho else [],
        enable_progress_bar=False,
        **BARE,
    )
    trainer.fit(module, training_batches(examples, encoder.states, settings.batch_size, settings.steps, run.seed))
    return module


@cache
def _held_out(encoder: CutEncoder, task: str) -> list[Batch]:
    return evaluation_batches(texts.parts(task)["validation"], encoder.states)


def _losses_around(module: TaskClassifier, batches: list[Batch]) -> list[float]:
    """The mean loss of batches at :data:`DISTANCES` along their own steepest direction."""
    loss, pairs = _loss(module, batches), find_pairs(module).pairs
    direction = adversarial_direction(Perturbation(pairs), loss_gradient(loss, trained_factors(pairs)))
    found: list[float] = loss_along_line(loss, pairs, direction, torch.tensor(DISTANCES)).tolist()
    return found


def _loss(module: TaskClassifier, batches: list[Batch]) -> MeanLoss:
    """The mean over the batches, each weighted by its number of texts."""
    texts_in_all = sum(len(batch["labels"]) for batch in batches)
    share = len(batches) / texts_in_all
    losses = []
    for batch in batches:

        def one(batch: Batch = batch) -> Tensor:
            return module.loss(batch) * len(batch["labels"]) * share

        losses.append(one)
    return MeanLoss(losses)
