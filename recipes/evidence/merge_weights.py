"""Kept adapters of W3, merged once more with a weight that is chosen on validation: what a careful user would do.

In the runs the weights of the three ways to merge are fixed. A method whose updates are larger may need a smaller one.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft.tuners.lora import LoraLayer
from torch import Tensor

from recipes.evidence.kept import Kept, restored
from recipes.evidence.kept_report import difference_cell, with_judgements
from recipes.evidence.merging import merged
from recipes.evidence.module import ShotsClassifier, plain_logits
from recipes.evidence.report import Report
from recipes.evidence.run import Run, batches_of, encoder_of, surroundings
from recipes.evidence.scores import scores
from recipes.evidence.verdict import difference
from recipes.evidence.workloads import BASELINE, TITLES
from recipes.shared.ledger import Row
from recipes.shared.statistics import mean_cell
from recipes.shared.tables import Table

RESULTS = "merge_weights.jsonl"
WEIGHTS = {"task_arithmetic": (0.1, 1 / 6, 0.25, 0.4, 0.6), "ties": (0.25, 0.5, 0.75, 1.0, 1.5)}
"""What is tried for each way to merge; 1/6 is the average of six adapters."""
_SETTING = {"task_arithmetic": "arithmetic_weight", "ties": "ties_weight"}


def judge(kept: Kept, folder: Path) -> Row:
    """Merge a run's adapters with the weight that has the lowest mean validation loss over the tasks.

    Returns:
        A JSON line: the run's key; ``ways``, by way to merge ``weight``, the chosen one, ``validation_loss`` by weight,
        and ``test_accuracy`` and ``test_loss`` with the chosen one, means over the tasks; ``update_norm``, the mean
        norm of the adapters' updates s B A over all layers, and ``update_cosine``, the mean cosine of two of them;
        ``seconds``, ``device``, ``commit`` and versions.
    """
    began = time.perf_counter()
    modules = restored(kept, folder)
    ways = {}
    for way, weights in WEIGHTS.items():
        losses = {}
        for weight in weights:
            losses[weight] = _scores(kept.run, modules, way, weight, "validation")["loss"]
        chosen = min(losses, key=lambda weight: losses[weight])
        on_test = _scores(kept.run, modules, way, chosen, "test")
        ways[way] = {
            "weight": chosen,
            "validation_loss": {f"{weight:.4g}": loss for weight, loss in losses.items()},
            "test_accuracy": on_test["accuracy"],
            "test_loss": on_test["loss"],
        }
    return kept.key() | {
        "ways": ways,
        **_geometry([_update(module) for module in modules.values()]),
        "seconds": time.perf_counter() - began,
        **surroundings(),
    }


@torch.no_grad()
def _update(module: ShotsClassifier) -> Tensor:
    """s B A of all adapted layers, one after the other in one vector."""
    layers = [layer for layer in module.net.modules() if isinstance(layer, LoraLayer)]
    return torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])


def _geometry(updates: Sequence[Tensor]) -> dict[str, float]:
    """The mean norm of the updates, and the mean cosine of two of them."""
    cosines = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in combinations(updates, 2)]
    norms = [float(update.norm()) for update in updates]
    return {"update_norm": statistics.mean(norms), "update_cosine": statistics.mean(cosines)}


def _scores(run: Run, modules: Mapping[str, ShotsClassifier], way: str, weight: float, part: str) -> dict[str, float]:
    """Loss and accuracy on a part, means over the tasks, of the merged adapter with each task's head."""
    encoder = encoder_of(run.settings)
    adapters = [module.net for module in modules.values()]
    net = merged(encoder.upper(), adapters, way, {**run.settings, _SETTING[way]: weight})
    found = []
    for task, module in modules.items():
        batches = batches_of(replace(run, settings={**run.settings, "data": task}), encoder, part)
        own, module.net = module.net, net
        found.append(scores(*plain_logits(module, batches)))
        module.net = own
    loss = statistics.mean(each["loss"] for each in found)
    return {"loss": loss, "accuracy": statistics.mean(each["accuracy"] for each in found)}


Pairs = Sequence[tuple[Row, Row | None]]
"""The rows of an arm's runs, each with that of its adapters as they were judged here."""


def _accuracies(pairs: Pairs, way: str) -> dict[int, float]:
    """By seed, in percent; a run that has failed counts with the accuracy of chance."""
    found = {}
    for row, judged in pairs:
        if judged is not None:
            found[row["seed"]] = 100 * judged["ways"][way]["test_accuracy"]
        elif row["failed"]:
            found[row["seed"]] = 100 * row["chance"]
    return found


def _counts(pairs: Pairs, way: str) -> str:
    """How often each weight was chosen, such as "0.5 (3), 1 (5)"."""
    chosen = [judged["ways"][way]["weight"] for _, judged in pairs if judged is not None]
    return ", ".join(f"{weight:.3g} ({chosen.count(weight)})" for weight in sorted(set(chosen)))


class MergeWeightsReport:
    """Test accuracy of each arm with the chosen weights, and these weights.

    Args:
        report: of the workload's runs.
    """

    def __init__(self, report: Report) -> None:
        self.name = f"{report.plan.workload}_merge_weights"
        self._title = f"{report.plan.workload}, merged with a weight chosen on validation"
        self._judged = with_judgements(report.rows, report.plan.folder / RESULTS)

    def is_empty(self) -> bool:
        """Whether no run has been judged."""
        return not self._judged

    def tables(self) -> list[Table]:
        """One table, a line for each arm."""
        columns = ["arm", "norm of an update", "cosine of two"]
        for way in WEIGHTS:
            columns += [f"{way.replace('_', ' ')}, accuracy in %", "minus LoRA's", "weights chosen"]
        notes = [
            "mean over the tasks ± standard error over the seeds (seeds); differences: paired by seed, with 95 % "
            "intervals",
            "a run takes the weight of the lowest mean validation loss over the tasks; in brackets, how many runs do",
        ]
        return [Table(self._title, columns, [self._line(arm) for arm in self._judged], notes)]

    def figure(self) -> Figure | None:
        """None: there is nothing to see that the table does not say."""
        return None

    def _line(self, arm: str) -> list[str]:
        found = [judged for _, judged in self._judged[arm] if judged is not None]
        line = [TITLES[arm]]
        for name in ("update_norm", "update_cosine"):
            line.append(mean_cell([judged[name] for judged in found], 2))
        for way in WEIGHTS:
            accuracies = _accuracies(self._judged[arm], way)
            to_base = None
            if arm != BASELINE:
                to_base = difference(accuracies, _accuracies(self._judged.get(BASELINE, []), way))
            counts = _counts(self._judged[arm], way)
            line += [mean_cell(list(accuracies.values()), 1), difference_cell(to_base, 2), counts]
        return line
