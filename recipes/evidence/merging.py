"""A run of W3: six adapters, trained apart from one start, are merged into one by peft's functions."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import task_arithmetic, ties
from torch import Tensor, nn

from recipes.evidence.encoder import CutEncoder, UpperLayers
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
from recipes.evidence.weights import keep
from recipes.evidence.workloads import PROBE, Settings
from recipes.shared.ledger import Row

PRIMARY_WAY = "ties"
FEWER = (2, 4)  # adapters, the first ones, which are merged by TIES too
_CLASSES = 2


def _average(updates: list[Tensor], settings: Settings) -> Tensor:
    mean: Tensor = task_arithmetic(updates, _weights(updates, 1 / len(updates)))
    return mean


def _task_arithmetic(updates: list[Tensor], settings: Settings) -> Tensor:
    total: Tensor = task_arithmetic(updates, _weights(updates, settings["arithmetic_weight"]))
    return total


def _ties(updates: list[Tensor], settings: Settings) -> Tensor:
    agreed: Tensor = ties(updates, _weights(updates, settings["ties_weight"]), settings["ties_density"])
    return agreed


def _weights(updates: Sequence[Tensor], weight: float) -> Tensor:
    return torch.full((len(updates),), weight, dtype=updates[0].dtype)


WAYS: dict[str, Callable[[list[Tensor], Settings], Tensor]] = {
    "average": _average,
    "task_arithmetic": _task_arithmetic,
    PRIMARY_WAY: _ties,
}
"""By name: what is made of the updates s B A (m, n) that several adapters add to one weight, with the settings."""


def perform_merging(run: Run, folder: Path | None = None) -> Row:
    """Train an adapter and a head for each task, merge the adapters, and judge them with the heads.

    The arguments are those of :func:`recipes.evidence.run.perform`.

    Returns:
        A JSON line as :func:`recipes.evidence.run.perform` gives it. Its scores are those of the adapter merged by
        TIES with the head of each task, and ``temperature`` is fitted for each task: all are means over the tasks.
        ``train_loss`` is the mean of the adapters before merging. ``single`` holds the ``_accuracy`` and ``_loss`` of
        each adapter before merging by task, ``merged`` those of the merged adapter by way and task, and ``fewer``
        those of TIES by the number of adapters and task; the last two have only TIES on all tasks in the stage
        "search". A run fails as a whole if one of its adapters has failed, and has none of the three then.
    """
    gc.collect()  # the last run's models: their parts point at each other
    began, processor = time.perf_counter(), time.process_time()
    runs = {task: replace(run, settings={**run.settings, "data": task}) for task in run.settings["tasks"]}
    encoder = encoder_of(run.settings)
    row = run.key() | (_probes(runs, encoder) if run.arm == PROBE else _adapters(run, runs, encoder, folder))
    return row | {
        "chance": 1 / _CLASSES,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        **surroundings(),
    }


def trained(run: Run, encoder: CutEncoder) -> ShotsClassifier:
    """An adapter and a head, trained on the run's data, with the weights that the run is judged by."""
    # Anew for each task, so that all adapters begin with one A, and all heads alike.
    L.seed_everything(run.seed, verbose=False)
    module = ShotsClassifier(encoder, _CLASSES, run.settings, run.config)
    for callback in fit(run, module, encoder):
        callback.restore(module)
    return module


@torch.no_grad()
def merged(upper: UpperLayers, nets: Sequence[PeftModel], way: str, settings: Settings) -> UpperLayers:
    """Upper layers with the merged updates of several adapters in their weights.

    Args:
        upper: pretrained layers, which are changed in place.
        nets: layers with an adapter each, all on the same modules.
        way: of :data:`WAYS`.
        settings: of the workload.
    """
    layers = [net.get_base_model() for net in nets]
    for name, module in layers[0].named_modules():
        if isinstance(module, LoraLayer):
            updates = [one.get_submodule(name).get_delta_weight("default") for one in layers]
            upper.get_parameter(f"{name}.weight").add_(WAYS[way](updates, settings))
    return upper


def _adapters(run: Run, runs: Mapping[str, Run], encoder: CutEncoder, folder: Path | None) -> Row:
    modules: dict[str, ShotsClassifier] = {}
    single: dict[str, Row] = {}
    for task, of_task in runs.items():
        modules[task] = trained(of_task, encoder)
        single[task] = _judged_alone(of_task, modules[task], encoder)
        if single[task]["failed"]:
            return single[task]
    weights = {}
    if folder is not None and run.stage == "test":
        weights["weights"] = keep(nn.ModuleDict(modules), run.key(), folder)
    return {
        **_merged_rows(run, runs, encoder, modules),
        "train_loss": statistics.mean(row["train_loss"] for row in single.values()),
        "single": _short(single),
        **weights,
    }


def _merged_rows(run: Run, runs: Mapping[str, Run], encoder: CutEncoder, modules: Mapping[str, ShotsClassifier]) -> Row:
    # Put aside, since the modules are judged with the merged layers in place of their own.
    nets = {task: module.net for task, module in modules.items()}

    def judge(way: str, tasks: Sequence[str]) -> dict[str, Row]:
        net = merged(encoder.upper(), [nets[task] for task in tasks], way, run.settings)
        found = {}
        for task in tasks:
            modules[task].net = net
            found[task] = judged(runs[task], _held_out(runs[task], modules[task], encoder), _CLASSES)
        return found

    tasks = list(runs)
    ways, numbers = (list(WAYS), FEWER) if run.stage == "test" else ([PRIMARY_WAY], ())
    by_way = {way: judge(way, tasks) for way in ways}
    return {
        **_means(by_way[PRIMARY_WAY]),
        "merged": {way: _short(rows) for way, rows in by_way.items()},
        "fewer": {str(number): _short(judge(PRIMARY_WAY, tasks[:number])) for number in numbers},
    }


def _judged_alone(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Row:
    if module.has_failed:
        return judged(run, {}, _CLASSES)
    train = plain_logits(module, training_batches(run, encoder))
    return judged(run, {"train": train, **_held_out(run, module, encoder)}, _CLASSES)


def _held_out(run: Run, module: ShotsClassifier, encoder: CutEncoder) -> Logits:
    """In float32, so that the rounding of merged weights plays no part."""
    return {part: plain_logits(module, batches_of(run, encoder, part)) for part in parts_of(run)}


def _probes(runs: Mapping[str, Run], encoder: CutEncoder) -> Row:
    """A linear classifier for each task; there is nothing to merge."""
    single = {task: judged(run, probed(run, encoder, _CLASSES), _CLASSES) for task, run in runs.items()}
    return {**_means(single), "single": _short(single)}


def _means(by_task: Mapping[str, Row]) -> Row:
    """Over the tasks; those of a task that has failed, if one has."""
    rows = list(by_task.values())
    for row in rows:
        if row["failed"]:
            return row
    means: Row = {"failed": False}
    for name in rows[0]:
        if name != "failed":
            means[name] = statistics.mean(row[name] for row in rows)
    return means


def _short(by_task: Mapping[str, Row]) -> dict[str, Row]:
    """Without calibration: with all scores of all ways the ledger would be ten times as large."""
    found = {}
    for task, row in by_task.items():
        found[task] = {name: value for name, value in row.items() if name.endswith(("_accuracy", "_loss"))}
    return found
