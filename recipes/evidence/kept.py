"""Finished runs whose weights are kept, and ways to judge these once more. Nothing is trained."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from recipes.evidence.module import ShotsClassifier
from recipes.evidence.plan import Plan, key_of_row
from recipes.evidence.run import Run, encoder_of
from recipes.evidence.weights import restore
from recipes.evidence.workloads import Settings, has_tasks, is_in_turn, is_merging
from recipes.language import texts
from recipes.shared.ledger import Ledger, Row

_WAIT = 2.0  # seconds, while other processes do all that is left


@dataclass(frozen=True)
class Kept:
    """A finished run whose weights are kept.

    Attributes:
        run: that trained them.
        weights: their file, relative to the ledger's folder.
    """

    run: Run
    weights: str

    def __str__(self) -> str:
        return str(self.run)

    def key(self) -> Row:
        """The run's own."""
        return self.run.key()


Judge = Callable[[Kept, Path], Row]
"""Gives the row of an adapter whose weights are in a folder; the row begins with the run's key."""


def kept_runs(plan: Plan) -> list[Kept]:
    """All runs of the plan's workload, arms and seeds that name a file of weights."""
    found = []
    for row in plan.ledger.rows:
        is_wanted = row["workload"] == plan.workload and row["settings"] == plan.settings
        if is_wanted and row["arm"] in plan.arms and row["seed"] in plan.seeds and "weights" in row:
            found.append(Kept(Run(**key_of_row(row)), row["weights"]))
    return found


def ledger_of(path: Path) -> Ledger:
    """The rows of one evaluation, one for each kept adapter."""
    return Ledger(path, key_of_row)


def work(runs: Iterable[Kept], path: Path, judge: Judge, report: Callable[[int], None]) -> None:
    """Judge all that no process has judged yet, until nothing is left.

    Args:
        runs: with their weights in the folder.
        path: of the rows, in that folder.
        judge: the evaluation.
        report: is called with the number of finished runs, those of other processes included, when it has grown.
    """
    ledger, runs = ledger_of(path), list(runs)
    left = [run for run in runs if ledger.find(run) is None]
    while left:
        if not ledger.perform_first(left, lambda kept: judge(kept, path.parent), lambda run: None):
            time.sleep(_WAIT)
        ledger.reload()
        before = len(left)
        left = [run for run in runs if ledger.find(run) is None]
        if len(left) < before:  # nothing is, while other processes do all that is left
            report(len(runs) - len(left))


def restored(kept: Kept, folder: Path) -> dict[str, ShotsClassifier]:
    """New modules with the kept weights, in float32, by the data that each is for.

    A run on several tasks has a module for each: with the task's head, and with its own adapter before merging (W3) or
    a copy of the one that has learned them in turn (W5).
    """
    settings = kept.run.settings
    names = settings["tasks"] if has_tasks(settings) else [settings["data"]]
    modules = {}
    for data in names:
        classes = len(texts.TASKS[data].classes)
        modules[data] = ShotsClassifier(encoder_of(settings), classes, settings, kept.run.config)
    for part in _as_written(modules, settings):
        restore(part, folder / kept.weights)
    return modules


def _as_written(modules: Mapping[str, ShotsClassifier], settings: Settings) -> list[nn.Module]:
    """What the modules are parts of, each with the names and the shapes of the file of weights."""
    if is_merging(settings):
        return [nn.ModuleDict(modules)]
    if is_in_turn(settings):
        heads = nn.ModuleDict({task: module.head for task, module in modules.items()})
        return [nn.ModuleDict({"adapter": module.net, "heads": heads}) for module in modules.values()]
    return list(modules.values())
