"""One method of the demo, in a process of its own: train, test, measure sharpness, write result.json."""

import json
import math
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_flatlora import AdapterCheckpoint, Perturbation, find_pairs
from lightning_flatlora.flatness import MeanLoss, sam_sharpness
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.chat import PLAIN_TEMPLATE
from recipes.language.model import PACKAGED_LORA, model_source
from recipes.shared.files import write_whole
from recipes.shared.ledger import Ledger, Row, entries
from recipes.shared.methods import OURS, callbacks_of
from recipes.shared.precision import Precision, fast_precision
from recipes.shared.progress import progress, progress_bar
from recipes.shared.random_state import RandomState
from recipes.shared.step_times import StepTimes

METHODS = ("untuned", *OURS)
TOKENS = "tokens"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result; a folder's results are kept only while these stay the same.

    Attributes:
        dataset: the recipe's name of the data.
        model: the recipe's name of the model.
        rho: radius, chosen on the validation part (docs/recipes/instruction_tuning.md).
        steps: optimizer steps of each method.
        batch_size: conversations of a step.
        max_length: tokens of the longest conversations; longer ones are left out, for the sake of slow machines.
        learning_rate: AdamW's largest.
        test_batches: held-out batches, of ``batch_size`` questions; None takes them all.
        sharpness_batches: training batches on which sharpness is measured.
        seed: of adapters, batches and dropout.
        precision: of training and evaluation; by default what the device computes fast.
    """

    dataset: str = "packaged:sentiment"
    model: str = "packaged"
    rho: float = 0.03
    steps: int = 32
    batch_size: int = 8
    max_length: int = 36
    learning_rate: float = 1e-3
    test_batches: int | None = 20
    sharpness_batches: int = 4
    seed: int = 0
    precision: Precision = field(default_factory=fast_precision)


class Run(NamedTuple):
    """One method of the demo.

    Attributes:
        method: one of :data:`METHODS`; "untuned" only evaluates.
        settings: of the demo.
        folder: of this method: checkpoints, log and ``result.json``.
    """

    method: str
    settings: Settings
    folder: Path

    def __str__(self) -> str:
        return self.method

    def key(self) -> Row:
        """The first entries of its row."""
        return {"method": self.method, "settings": asdict(self.settings)}


def ledger(folder: Path) -> Ledger:
    """The ``results.jsonl`` of the runs in a folder."""
    return Ledger(folder / "results.jsonl", entries("method", "settings"))


def perform(run: Run) -> Row:
    """Train from the last checkpoint, if there is one, and evaluate on held-out questions.

    Returns:
        What was written to ``result.json``.
    """
    trainer, module, data, times = train(run)
    tested = trainer.test(module, data, verbose=False)[0]
    row = {
        **run.key(),
        "test_accuracy": tested.get("test_accuracy"),
        "test_loss": tested["test_loss"],
        "median_step_seconds": statistics.median(times.seconds) if times.seconds else None,
        "peak_memory_mib": _peak_memory_mib(),
    }
    row |= sharpness(run.method, module, data, run.settings)
    write_whole(run.folder / "result.json", json.dumps(row, indent=2) + "\n")
    return row


def train(run: Run) -> tuple[L.Trainer, InstructionTuning, InstructionData, StepTimes]:
    """Model and data, after training with the run's method."""
    settings, folder = run.settings, run.folder
    L.seed_everything(settings.seed, verbose=False)
    data = _data(settings)
    if (folder.parent / TOKENS).exists():
        data.parts = _without_validation(dict(datasets.load_from_disk(folder.parent / TOKENS)))
    rate = settings.learning_rate
    module = InstructionTuning(model=settings.model, lora=PACKAGED_LORA, learning_rate=rate, warmup_steps=5)
    data.prepare_data()
    data.setup("fit")
    times = StepTimes()
    # The data are set up before the Trainer is made, because their number of batches decides its number of epochs.
    epochs = math.ceil(settings.steps / len(data.train_dataloader()))
    trainer = _trainer(run, epochs, times)
    if run.method != "untuned":
        last = folder / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    return trainer, module, data, times


def tokenize(settings: Settings, folder: Path) -> None:
    """Tokenize the reviews to train and to test on, once for all methods; a folder that is there stays as it is.

    Args:
        settings: of the demo.
        folder: of all methods; the tokens land in its folder :data:`TOKENS`.
    """
    if (folder / TOKENS).exists():
        return
    data = _data(settings)
    data.parts = _without_validation({})
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    partial_folder = folder / f"{TOKENS}.partial"
    tables = datasets.DatasetDict({part: data.parts[part] for part in ("train", "test")})
    tables.save_to_disk(partial_folder)
    # A run that was stopped while it wrote must not leave half of the tokens under the final name.
    partial_folder.rename(folder / TOKENS)


def _data(settings: Settings) -> InstructionData:
    return InstructionData(
        settings.dataset,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        chat_template=PLAIN_TEMPLATE,
        validation_share=0.15,
        test_share=0.25,
        seed=settings.seed,
        tokenizer=model_source(settings.model),
    )


def _without_validation(parts: dict[str, Any]) -> dict[str, Any]:
    """With an empty validation part, which is for choosing rho and not for the demo: it need not be tokenized."""
    return {**parts, "validation": []}


def _trainer(run: Run, epochs: int, times: StepTimes) -> L.Trainer:
    method, settings, folder = run
    flat = callbacks_of(method, settings.rho)
    checkpoints = AdapterCheckpoint(dirpath=folder, every_n_train_steps=8, save_top_k=0, save_last=True)
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision=settings.precision,
        max_epochs=epochs,
        limit_train_batches=settings.steps if epochs == 1 else None,  # so that the bar ends where training does
        max_steps=settings.steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        limit_val_batches=0,  # the validation part is for choosing rho and is not even tokenized here
        limit_test_batches=settings.test_batches,
        num_sanity_val_steps=0,
        callbacks=[times, *flat, checkpoints, RandomState(), progress_bar(method)],
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        enable_model_summary=False,
    )


def sharpness(method: str, module: InstructionTuning, data: InstructionData, settings: Settings) -> dict[str, float]:
    """SAM's sharpness L(w + E) - L(w) in full weight space, with the same rho for every method.

    E is the perturbation (Eqs. 10-15) of the mean gradient over a few training batches; both losses are over the same
    batches, without dropout, and in float32 whatever the training's precision: bfloat16's rounding is larger than the
    rise. The module is left in float32.

    Returns:
        ``train_loss`` L(w) and ``sharpness``, in nats per answer token.
    """
    first = islice(data.train_dataloader(), settings.sharpness_batches)
    batches = [module.transfer_batch_to_device(batch, module.device, 0) for batch in first]
    module.eval().float()
    # Each batch is read twice: for loss and gradient at the weights, and for the loss at the perturbed ones.
    with progress(f"{method}, sharpness, batches", 2 * len(batches)) as bar:
        loss = MeanLoss([partial(_loss, module, batch, bar.update) for batch in batches])
        result = sam_sharpness(loss, Perturbation(find_pairs(module).pairs), settings.rho)
    return {"train_loss": float(result.loss), "sharpness": float(result.sharpness)}


def _loss(module: InstructionTuning, batch: dict[str, Any], done: Callable[[], Any]) -> torch.Tensor:
    log_likelihood, tokens = module.log_likelihood(batch)
    done()
    return -log_likelihood.sum() / tokens.sum()


def _peak_memory_mib() -> float:
    """The process's largest resident memory, and on CUDA the largest allocation."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
