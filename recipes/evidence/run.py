"""One run: a seed's examples learned by one method with one configuration, and what came of it."""

import gc
import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_flatlora
from recipes.evidence.data import Batch, TrainingBatches, batch_places, evaluation_batches, training_examples
from recipes.evidence.encoder import CutEncoder, load, pooled
from recipes.evidence.module import BestOnValidation, ShotsClassifier, all_logits
from recipes.evidence.scores import both_scores, fitted_temperature, linear_probe, scores
from recipes.evidence.weights import keep
from recipes.evidence.workloads import PROBE, Config, Settings, method_of
from recipes.language import texts
from recipes.shared.ledger import Row, commit
from recipes.shared.methods import METHODS

_load = cache(load)


@dataclass(frozen=True)
class Run:
    """What makes a run that one, and no other.

    Attributes:
        workload: its name.
        settings: of the workload, with the precision.
        arm: a method that is searched for, a free competitor, or the linear probe.
        config: its configuration.
        seed: of the examples, the label noise, the adapter's start, the order of the batches, and dropout.
        stage: "search" on the validation part, or "test".
    """

    workload: str
    settings: Settings
    arm: str
    config: Config
    seed: int
    stage: str

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.config.items())
        return f"{self.workload}, {self.arm}{', ' + chosen if chosen else ''}, seed {self.seed}, {self.stage}"

    def key(self) -> Row:
        """The first entries of its JSON line."""
        row = {"workload": self.workload, "arm": self.arm, "config": self.config, "seed": self.seed}
        return {**row, "stage": self.stage, "settings": self.settings}


def perform(run: Run, folder: Path | None = None) -> Row:
    """Train and judge.

    Args:
        run: to do.
        folder: in which a run of the stage "test" leaves its trained weights; None keeps none.

    Returns:
        A JSON line: the run's key; ``train_loss`` of the examples trained on, with the labels that they had there;
        ``validation_`` and, in the stage "test", ``test_`` followed by each of the :func:`scores`; the same followed by
        ``_scaled`` at the ``temperature`` fitted on the validation part; ``at_end``, all of these at the last step,
        where they are those of better weights before it; ``weights``, the file in the folder that holds the adapter
        and the head which the run is judged by, where they are kept; ``chance``, ``seconds``, ``device``,
        ``commit`` and versions. ``failed`` is true where a loss was not finite: then the accuracies are those of
        chance, and all else is null.
    """
    gc.collect()  # the last run's model: its parts point at each other
    began, processor = time.perf_counter(), time.process_time()
    classes = len(texts.TASKS[run.settings["data"]].classes)
    encoder = encoder_of(run.settings)
    L.seed_everything(run.seed, verbose=False)
    module: ShotsClassifier | None = None
    if run.arm == PROBE:
        found = [probed(run, encoder, classes)]
    else:
        module = ShotsClassifier(encoder, classes, run.settings, run.config)
        found = _trained(run, module, encoder)
    row = run.key() | judged(run, found[0], classes)
    if len(found) > 1:
        row["at_end"] = judged(run, found[1], classes)
    if folder is not None and module is not None and run.stage == "test" and not row["failed"]:
        row["weights"] = keep(module, run.key(), folder)
    return row | {
        "chance": 1 / classes,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        **surroundings(),
    }


def encoder_of(settings: Settings) -> CutEncoder:
    """The workload's encoder, with the states that it has kept in this process."""
    return _load(settings["frozen_layers"], settings["length"])


def surroundings() -> Row:
    """What a row says of the device, the versions and the commit."""
    return {
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "lightning": L.__version__,
        "transformers": transformers.__version__,
        "lightning_flatlora": lightning_flatlora.__version__,
        "commit": commit(),
    }


Logits = dict[str, tuple[Tensor, Tensor]]
"""Logits and labels by part; empty where training has failed."""


def _trained(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> list[Logits]:
    """With the weights that the run is judged by, and if these are not the last ones, with the last ones too.

    The module is left with the weights that the run is judged by.
    """
    best = fit(run, module, encoder)
    if module.has_failed:
        return [{}]
    found = [_all_parts(run, module, encoder)]
    for callback in best:
        # The end is judged before this, since the weights of the end are lost with it.
        callback.restore(module)
        found.insert(0, _all_parts(run, module, encoder))
    return found


def fit(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> list[BestOnValidation]:
    """Train on the run's examples; the callbacks that keep better weights than the last ones, at most one."""
    settings, config = run.settings, run.config
    examples = training_examples(settings, run.seed, encoder.states)
    steps = settings["steps"] * config.get("length_of_training", 1)
    places = batch_places(len(examples), settings["batch_size"], steps, run.seed)
    # A free competitor is LoRA with another configuration.
    method = METHODS[method_of(run.arm)]
    best: list[BestOnValidation] = []
    if settings.get("judged") == "best" or config.get("early_stopping"):
        best = [BestOnValidation(batches_of(run, encoder, "validation"))]
    trainer = L.Trainer(
        # The kept states lie in the main memory, and steps are too small for a GPU to be faster.
        accelerator="cpu",
        precision=settings["precision"],
        max_epochs=1,
        callbacks=[*method.callbacks(**config, seed=run.seed), *best],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    batches = TrainingBatches(examples, places, encoder.states)
    trainer.fit(module, DataLoader(batches, batch_size=None, shuffle=False))
    return best


def _all_parts(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Logits:
    found = {"train": all_logits(module, training_batches(run, encoder))}
    for part in parts_of(run):
        found[part] = all_logits(module, batches_of(run, encoder, part))
    return found


def training_batches(run: Run, encoder: CutEncoder) -> list[Batch]:
    """The examples that a run trains on, once, for evaluation."""
    return evaluation_batches(training_examples(run.settings, run.seed, encoder.states), encoder.states)


def probed(run: Run, encoder: CutEncoder, classes: int) -> Logits:
    """The linear classifier on the frozen encoder, in float32."""
    upper = encoder.upper()

    @torch.no_grad()
    def features(batches: list[Batch]) -> tuple[Tensor, Tensor]:
        found = [pooled(upper(b["hidden"], b["owners"]), b["owners"], len(b["labels"])) for b in batches]
        return torch.cat(found), torch.cat([batch["labels"] for batch in batches])

    by_part = {"train": features(training_batches(run, encoder))}
    for part in parts_of(run):
        by_part[part] = features(batches_of(run, encoder, part))
    probe, _ = linear_probe(*by_part["train"], by_part["validation"], classes)
    with torch.no_grad():
        return {part: (probe(inputs), labels) for part, (inputs, labels) in by_part.items()}


def parts_of(run: Run) -> tuple[str, ...]:
    """The parts that a run may see, beside what it trains on."""
    return ("validation", "test") if run.stage == "test" else ("validation",)


def batches_of(run: Run, encoder: CutEncoder, part: str) -> list[Batch]:
    """The examples of a part, as many as the workload's settings allow."""
    return held_out(encoder, run.settings["data"], part, run.settings.get(part))


@cache
def held_out(encoder: CutEncoder, data: str, part: str, most: int | None = None) -> list[Batch]:
    """The examples of a part, or so many at most; the lower layers compute them once in a process."""
    return evaluation_batches(texts.parts(data)[part][:most], encoder.states)


def judged(run: Run, logits: Logits, classes: int) -> Row:
    """What a row says of these logits; those of the examples trained on may be left out."""
    finite = bool(logits) and all(bool(of_part.isfinite().all()) for of_part, _ in logits.values())
    if not finite:
        return {"failed": True, "train_loss": None} | _failed(run, classes)
    temperature = fitted_temperature(*logits["validation"])
    row: dict[str, Any] = {"failed": False, "temperature": temperature}
    if "train" in logits:
        row["train_loss"] = scores(*logits["train"])["loss"]
    for part in parts_of(run):
        of_part = both_scores(*logits[part], temperature)
        row |= {f"{part}_{name}": value for name, value in of_part.items()}
    return row


def _failed(run: Run, classes: int) -> Row:
    row: dict[str, Any] = {"temperature": None}
    for part in parts_of(run):
        row[f"{part}_accuracy"] = 1 / classes
        for name in ("loss", "ece", "brier"):
            row[f"{part}_{name}"] = None
            row[f"{part}_{name}_scaled"] = None
    return row
