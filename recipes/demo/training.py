"""A run of the demo: an adapter of a small encoder's upper layers is trained on few texts of a task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning as L
import torch
import transformers

from lightning_flatlora import EFMLoRA
from recipes.command_line.precision import Precision, fast_precision
from recipes.demo.data import training_batches
from recipes.demo.encoder import CutEncoder, load_encoder
from recipes.demo.module import TaskClassifier
from recipes.offline import texts
from recipes.training.module import BARE

kept = cache(load_encoder)
"""The encoder, loaded once per process."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines a run, apart from its method, rate and seed.

    Attributes:
        task: one of the packaged texts.
        frozen_layers: number of the encoder's frozen layers.
        length: tokens kept of a text.
        shots: training examples per class.
        steps: training steps.
        batch_size: texts per step.
        precision: Lightning's, for training.
    """

    task: str = "all_subjects"
    frozen_layers: int = 5
    length: int = 32
    shots: int = 16
    steps: int = 600
    batch_size: int = 8
    precision: Precision = field(default_factory=fast_precision)


def on_one_thread() -> None:
    """Leave the next core to another process, so that a run repeats bit for bit, and silence the libraries' notices."""
    transformers.utils.logging.set_verbosity_error()  # silences those on the pooler, which the encoder leaves out
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def trained(settings: Settings, encoder: CutEncoder, seed: int, config: Mapping[str, Any]) -> TaskClassifier:
    """Train a new adapter and head.

    Args:
        settings: the run's.
        encoder: the one whose upper layers get the adapter.
        seed: for the examples, the adapter's start, the order of the batches, and dropout.
        config: the module's arguments, and ``rho`` if EFMLoRA is added.
    """
    own = dict(config)
    rho = own.pop("rho", None)
    callbacks: list[L.Callback] = [] if rho is None else [EFMLoRA(rho)]
    # Again for each training, so that all adapters of a seed begin with the same A, and all heads alike.
    L.seed_everything(seed, verbose=False)
    module = TaskClassifier(encoder, len(texts.TASKS[settings.task].classes), **own)
    examples = texts.shots(settings.task, settings.shots, seed)
    trainer = L.Trainer(
        # The kept states lie in the main memory, and steps are too small for a GPU to be faster.
        accelerator="cpu",
        precision=settings.precision,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=callbacks,
        enable_progress_bar=False,
        **BARE,
    )
    trainer.fit(module, training_batches(examples, encoder.states, settings.batch_size, settings.steps, seed))
    return module
