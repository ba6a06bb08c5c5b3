"""A run of W3: six adapters, trained apart from one start, are merged into one by peft's functions."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import task_arithmetic, ties
from torch import Tensor, nn

from recipes.evidence.encoder import CutEncoder, UpperLayers
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.run import Run
from recipes.evidence.tasks import judged_after_training, judged_again, means, perform_on_tasks, short, trained
from recipes.evidence.weights import keep
from recipes.evidence.workloads import Settings
from recipes.shared.ledger import Row

PRIMARY_WAY = "ties"
FEWER = (2, 4)  # adapters, the first ones, which are merged by TIES too


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


def fewer_than(tasks: Sequence[str]) -> list[int]:
    """How many adapters are merged beside all of them."""
    return [number for number in FEWER if number < len(tasks)]


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
    return perform_on_tasks(run, partial(_adapters, folder=folder))


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
        single[task] = judged_after_training(of_task, modules[task], encoder)
        if single[task]["failed"]:
            return single[task]
    weights = {}
    if folder is not None and run.stage == "test":
        weights["weights"] = keep(nn.ModuleDict(modules), run.key(), folder)
    return {
        **_merged_rows(run, runs, encoder, modules),
        "train_loss": statistics.mean(row["train_loss"] for row in single.values()),
        "single": short(single),
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
            found[task] = judged_again(runs[task], modules[task], encoder)
        return found

    tasks = list(runs)
    ways, numbers = (list(WAYS), fewer_than(tasks)) if run.stage == "test" else ([PRIMARY_WAY], [])
    by_way = {way: judge(way, tasks) for way in ways}
    return {
        **means(by_way[PRIMARY_WAY]),
        "merged": {way: short(rows) for way, rows in by_way.items()},
        "fewer": {str(number): short(judge(PRIMARY_WAY, tasks[:number])) for number in numbers},
    }
