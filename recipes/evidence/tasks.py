"""What the runs on several tasks have in common: an adapter's training on one of them, judging it, and means."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import lightning as L
from peft import PeftModel

from recipes.evidence.encoder import CutEncoder
from recipes.evidence.module import ShotsClassifier, plain_logits
from recipes.evidence.run import (
    Logits,
    Run,
    batches_of,
    encoder_of,
    fit,
    judged,
    parts_of,
    probed,
    surroundings,
    training_batches,
)
from recipes.evidence.workloads import PROBE
from recipes.shared.ledger import Row

CLASSES = 2


def perform_on_tasks(run: Run, learn: Callable[[Run, Mapping[str, Run], CutEncoder], Row]) -> Row:
    """Train and judge on all tasks of a workload; a JSON line as :func:`recipes.evidence.run.perform` gives it.

    Args:
        run: to do.
        learn: trains and judges. It takes the run, a run for each task by its name, and the encoder, and returns what
            is found. The linear probe, which has no adapter, is fitted for each task in its place.
    """
    gc.collect()  # the last run's models: their parts point at each other
    began, processor = time.perf_counter(), time.process_time()
    runs = {task: replace(run, settings={**run.settings, "data": task}) for task in run.settings["tasks"]}
    encoder = encoder_of(run.settings)
    row = run.key() | (_probes(runs, encoder) if run.arm == PROBE else learn(run, runs, encoder))
    return row | {
        "chance": 1 / CLASSES,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        **surroundings(),
    }


def trained(run: Run, encoder: CutEncoder, net: PeftModel | None = None) -> ShotsClassifier:
    """An adapter and a head, trained on the run's data, with the weights that the run is judged by.

    Args:
        run: on one task.
        encoder: of the workload.
        net: upper layers whose adapter is trained further, in place; None begins a new adapter.
    """
    # Anew for each task, so that all new adapters begin with one A, and all heads alike.
    L.seed_everything(run.seed, verbose=False)
    module = ShotsClassifier(encoder, CLASSES, run.settings, run.config)
    if net is not None:
        module.net = net
    for callback in fit(run, module, encoder):
        callback.restore(module)
    return module


def judged_after_training(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Row:
    """What a row says of a module that has just been trained on the run's data, in float32."""
    if module.has_failed:
        return judged(run, {}, CLASSES)
    train = plain_logits(module, training_batches(run, encoder))
    return judged(run, {"train": train, **_held_out(run, module, encoder)}, CLASSES)


def judged_again(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Row:
    """The same without the examples trained on, for a module whose adapter has changed since."""
    return judged(run, _held_out(run, module, encoder), CLASSES)


def _held_out(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Logits:
    """In float32, so that the rounding of weights that are merged or trained further plays no part."""
    return {part: plain_logits(module, batches_of(run, encoder, part)) for part in parts_of(run)}


def _probes(runs: Mapping[str, Run], encoder: CutEncoder) -> Row:
    single = {task: judged(run, probed(run, encoder, CLASSES), CLASSES) for task, run in runs.items()}
    return {**means(single), "single": short(single)}


def means(by_task: Mapping[str, Row]) -> Row:
    """Over the tasks; those of a task that has failed, if one has."""
    rows = list(by_task.values())
    for row in rows:
        if row["failed"]:
            return row
    found: Row = {"failed": False}
    for name in rows[0]:
        if name != "failed":
            found[name] = statistics.mean(row[name] for row in rows)
    return found


def short(by_task: Mapping[str, Row]) -> dict[str, Row]:
    """Without calibration: with all scores of all tasks the ledger would be ten times as large."""
    found = {}
    for task, row in by_task.items():
        found[task] = {name: value for name, value in row.items() if name.endswith(("_accuracy", "_loss"))}
    return found
