"""One few-shot run of the demo: the small model adapted by one method to a drawing style it has never seen."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_flatlora import EFMLoRA, FMLoRA
from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.module import FewShot
from recipes.clip_fewshot.sources import load
from recipes.precision import Precision, fast_precision
from recipes.progress import progress_bar
from recipes.step_times import StepTimes

METHODS = ("LoRA", "EFMLoRA", "FMLoRA")
ZERO_SHOT = "zero-shot"
Row = dict[str, Any]


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


def run(method: str, shots: int, seed: int, settings: Settings, model: Path, images: Path, part: str = "test") -> Row:
    """Adapt the model, and classify the images of a part that training does not see.

    Args:
        method: one of :data:`METHODS`, or :data:`ZERO_SHOT`, which trains nothing.
        shots: images of each class to train on.
        seed: of the shots, the adapter's start, the batches and dropout.
        settings: of the demo.
        model: folder that open_clip loads.
        images: folder with train/CLASS/ and the like.
        part: to classify, "validation" or "test".

    Returns:
        A JSON line: what :func:`key` gives, accuracy, the label given to each image, in the order of :func:`examples`,
        and the median seconds of a step.
    """
    L.seed_everything(seed, verbose=False)
    lora = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    module = FewShot(model=f"local-dir:{model}", pretrained=None, lora=lora, learning_rate=settings.learning_rate)
    data = FewShotData(
        dataset=str(images),
        shots=max(shots, 1),
        validation_shots=0,
        seed=seed,
        batch_size=settings.batch_size,
        iterations_per_shot=settings.iterations_per_shot,
        templates=["{}"],  # as in the captions
        crop_scale=(0.6, 1.0),
        flip=0.0,  # letters, arrows and clocks
    )
    times = StepTimes()
    trainer = _trainer(method, settings, times)
    trainer.fit(module, data)
    data.parts["test"] = examples(images, part)
    labels = torch.tensor([label for _, label in data.parts["test"]])
    given = torch.cat(list(_classified(module, data.test_dataloader())))
    return {
        **key(method, shots, seed, settings, model, part),
        "accuracy": (given == labels).float().mean().item(),
        "given": given.tolist(),
        "seconds_per_step": statistics.median(times.seconds) if times.seconds else None,
    }


def key(method: str, shots: int, seed: int, settings: Settings, model: Path, part: str = "test") -> Row:
    """What makes a run that one: the first entries of its JSON line."""
    decided = {"model": model.name, "part": part, "settings": asdict(settings)}
    return {"method": method, "shots": shots, "seed": seed, **decided}


def finished(path: Path, wanted: Row) -> Row | None:
    """A run's line in a file of JSON lines, or None; a line that a stop has cut off counts for nothing."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row: Row = json.loads(line)
        except ValueError:
            continue
        if wanted.items() <= row.items():
            return row
    return None


def append(path: Path, row: Row) -> None:
    """Add a run's line to a file of JSON lines, on a line of its own even if a stop has cut off the last one."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (not before.endswith("\n") and before != "") + json.dumps(row) + "\n")


def examples(images: Path, part: str) -> list[tuple[Path, int]]:
    """Paths and labels of a part, in a fixed order."""
    return load(str(images)).parts[part]


def _trainer(method: str, settings: Settings, times: StepTimes) -> L.Trainer:
    flat: dict[str, Callable[[], list[L.Callback]]] = {
        "EFMLoRA": lambda: [EFMLoRA(settings.rho)],
        "FMLoRA": lambda: [FMLoRA(settings.rho)],
    }
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision=settings.precision,
        max_epochs=1,
        max_steps=0 if method == ZERO_SHOT else -1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[times, *flat.get(method, list)(), progress_bar(method)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


@torch.no_grad()
def _classified(module: FewShot, loader: Any) -> Iterator[torch.Tensor]:
    """The most probable label of each image, batch after batch."""
    module.eval()
    module.forget_class_features()
    for batch in loader:
        yield module.probabilities(batch["images"].to(module.device)).argmax(dim=1).cpu()
