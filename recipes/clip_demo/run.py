"""One few-shot run of the demo: the small model adapted by one method to a drawing style it has never seen."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from recipes.clip_fewshot.emoji import emoji_data, examples
from recipes.clip_fewshot.module import FewShot
from recipes.shared.ledger import Ledger, Row, entries
from recipes.shared.methods import BY_TITLE
from recipes.shared.precision import Precision, fast_precision
from recipes.shared.progress import progress_bar
from recipes.shared.step_times import StepTimes
from recipes.shared.training import BARE

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run beside the model, the method, the shots and the seed.

    Attributes:
        iterations_per_shot: optimizer steps for each shot.
        batch_size: images of a step.
        learning_rate: AdamW's at the start of a cosine; larger than for a large model, which gets more steps.
        rank: of the adapter.
        alpha: the adapter is scaled by alpha / rank.
        dropout: on the adapter's input.
        rho: radius of the perturbation, chosen on the validation part (docs/recipes/clip_demo.md).
        precision: of training; by default what the device computes fast.
    """

    iterations_per_shot: int = 10
    batch_size: int = 32
    learning_rate: float = 5e-3
    rank: int = 2
    alpha: float = 1.0
    dropout: float = 0.25
    rho: float = 0.03
    precision: Precision = field(default_factory=fast_precision)


class Run(NamedTuple):
    """One training of the demo.

    Attributes:
        method: one of :data:`recipes.shared.methods.OURS`, or :data:`ZERO_SHOT`, which trains nothing.
        shots: images of each class to train on.
        seed: of the shots, the adapter's start, the batches and dropout.
        settings: of the demo.
        model: folder that open_clip loads.
        images: folder with train/CLASS/ and the like.
    """

    method: str
    shots: int
    seed: int
    settings: Settings
    model: Path
    images: Path

    def __str__(self) -> str:
        return f"{self.method}, shots {self.shots}, seed {self.seed}" if self.shots else self.method

    def key(self) -> Row:
        """The first entries of its row."""
        row = {"method": self.method, "shots": self.shots, "seed": self.seed, "model": self.model.name}
        return {**row, "settings": asdict(self.settings)}


def ledger(folder: Path) -> Ledger:
    """The ``results.jsonl`` of the runs in a folder."""
    return Ledger(folder / "results.jsonl", entries("method", "shots", "seed", "model", "settings"))


def perform(run: Run) -> Row:
    """Adapt the model, and classify the images of the test part.

    Returns:
        A row: the run's key, accuracy, the label given to each image, in the order of
        :func:`recipes.clip_fewshot.emoji.examples`, and the median seconds of a step.
    """
    settings = run.settings
    L.seed_everything(run.seed, verbose=False)
    lora = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    module = FewShot(model=f"local-dir:{run.model}", pretrained=None, lora=lora, learning_rate=settings.learning_rate)
    # Zero-shot trains on nothing, but a data module needs a shot.
    data = emoji_data(run.images, max(run.shots, 1), run.seed, settings.batch_size, settings.iterations_per_shot)
    times = StepTimes()
    trainer = _trainer(run.method, settings, times)
    trainer.fit(module, data)
    data.parts["test"] = examples(run.images, "test")
    labels = torch.tensor([label for _, label in data.parts["test"]])
    predictions = torch.cat(list(_classified(module, data.test_dataloader())))
    return {
        **run.key(),
        "accuracy": (predictions == labels).float().mean().item(),
        "given": predictions.tolist(),
        "seconds_per_step": statistics.median(times.seconds) if times.seconds else None,
    }


def _trainer(method: str, settings: Settings, times: StepTimes) -> L.Trainer:
    flat = BY_TITLE[method].callbacks(rho=settings.rho) if method in BY_TITLE else []
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision=settings.precision,
        max_epochs=1,
        # No step, but everything else: the model must be set up as for the others.
        max_steps=0 if method == ZERO_SHOT else -1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[times, *flat, progress_bar(method)],
        **BARE,
    )


@torch.no_grad()
def _classified(module: FewShot, loader: Any) -> Iterator[torch.Tensor]:
    """The most probable label of each image, batch after batch."""
    module.eval()
    module.forget_class_features()
    for batch in loader:
        yield module.probabilities(batch["images"].to(module.device)).argmax(dim=1).cpu()
