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
from typing import Any

import datasets
import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA, Perturbation, find_pairs
from lightning_flatlora.flatness import MeanLoss, sam_sharpness
from recipes.instruction_tuning.chat import PLAIN_TEMPLATE
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.model import model_source
from recipes.instruction_tuning.module import InstructionTuning
from recipes.precision import Precision, fast_precision
from recipes.progress import progress, progress_bar
from recipes.random_state import RandomState
from recipes.step_times import StepTimes

METHODS = ("untuned", "LoRA", "EFMLoRA", "FMLoRA")
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


def run(method: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train with one method from its last checkpoint, if there is one, and evaluate on held-out questions.

    Args:
        method: one of :data:`METHODS`; "untuned" only evaluates.
        settings: of the demo.
        folder: of this method: checkpoints, log and ``result.json``.

    Returns:
        What was written to ``result.json``.
    """
    trainer, module, data, times = train(method, settings, folder)
    tested = trainer.test(module, data, verbose=False)[0]
    result = {
        "method": method,
        "settings": asdict(settings),
        "test_accuracy": tested.get("test_accuracy"),
        "test_loss": tested["test_loss"],
        "median_step_seconds": statistics.median(times.seconds) if times.seconds else None,
        "peak_memory_mib": _peak_memory_mib(),
    }
    result |= sharpness(method, module, data, settings)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def train(
    method: str, settings: Settings, folder: Path
) -> tuple[L.Trainer, InstructionTuning, InstructionData, StepTimes]:
    """Model and data, after training with one method."""
    L.seed_everything(settings.seed, verbose=False)
    data = _data(settings)
    if (folder.parent / TOKENS).exists():
        data.parts = _without_validation(dict(datasets.load_from_disk(folder.parent / TOKENS)))
    module = InstructionTuning(model=settings.model, learning_rate=settings.learning_rate, warmup_steps=5)
    data.prepare_data()
    data.setup("fit")
    times = StepTimes()
    epochs = math.ceil(settings.steps / len(data.train_dataloader()))
    trainer = _trainer(method, settings, epochs, folder, times)
    if method != "untuned":
        last = folder / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    return trainer, module, data, times


def tokenise(settings: Settings, folder: Path) -> None:
    """Tokenise the reviews to train and to test on, once for all methods; a folder that is there stays as it is.

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
    partial_folder.rename(folder / TOKENS)


def _data(settings: Settings) -> InstructionData:
    return InstructionData(
        settings.dataset,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        chat_template=PLAIN_TEMPLATE,
        seed=settings.seed,
        tokenizer=model_source(settings.model),
    )


def _without_validation(parts: dict[str, Any]) -> dict[str, Any]:
    """With an empty validation part, which is for choosing rho and not for the demo: it need not be tokenised."""
    return {**parts, "validation": []}


def _trainer(method: str, settings: Settings, epochs: int, folder: Path, times: StepTimes) -> L.Trainer:
    flat: dict[str, Callable[[], list[L.Callback]]] = {
        "EFMLoRA": lambda: [EFMLoRA(settings.rho)],
        "FMLoRA": lambda: [FMLoRA(settings.rho)],
    }
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
        limit_val_batches=settings.test_batches,
        limit_test_batches=settings.test_batches,
        check_val_every_n_epoch=epochs + 1,
        num_sanity_val_steps=0,
        callbacks=[times, *flat.get(method, list)(), checkpoints, RandomState(), progress_bar(method)],
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
    batches = [_on(module.device, batch) for batch in islice(data.train_dataloader(), settings.sharpness_batches)]
    module.eval().float()
    # Each batch is read twice: for loss and gradient at the weights, and for the loss at the perturbed ones.
    with progress(f"{method}, sharpness, batches", 2 * len(batches)) as advance:
        loss = MeanLoss([partial(_loss, module, batch, advance) for batch in batches])
        found = sam_sharpness(loss, Perturbation(find_pairs(module).pairs), settings.rho)
    return {"train_loss": float(found.loss), "sharpness": float(found.sharpness)}


def _loss(module: InstructionTuning, batch: dict[str, Any], done: Callable[[], None]) -> torch.Tensor:
    log_likelihood, tokens = module.log_likelihood(batch)
    done()
    return -log_likelihood.sum() / tokens.sum()


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _peak_memory_mib() -> float:
    """The process's largest resident memory, and on CUDA the largest allocation."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
