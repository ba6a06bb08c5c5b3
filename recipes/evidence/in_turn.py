"""A run of W5: one adapter is trained on several tasks in turn, and judged on those that it has learned so far."""

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from peft import PeftModel
from torch import nn

from recipes.evidence.encoder import CutEncoder
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.run import Run
from recipes.evidence.tasks import judged_after_training, judged_again, means, perform_on_tasks, short, trained
from recipes.evidence.weights import keep
from recipes.shared.ledger import Row


def perform_in_turn(run: Run, folder: Path | None = None) -> Row:
    """Train one adapter on each task in turn, with a head for each, and judge it after each task.

    The arguments are those of :func:`recipes.evidence.run.perform`.

    Returns:
        A JSON line as :func:`recipes.evidence.run.perform` gives it. Its scores are those of the last adapter with the
        head of each task, and ``temperature`` is fitted for each task: all are means over the tasks. ``train_loss`` is
        the mean over the tasks, right after each was learned. ``after`` holds by the number of tasks learned so far,
        "1" and so on, and by each of these tasks the ``_accuracy`` and ``_loss`` of the adapter at that time with the
        task's head. A run fails as a whole if training on one of its tasks has failed, and has no ``after`` then.
    """
    return perform_on_tasks(run, partial(_learn, folder=folder))


def _learn(run: Run, runs: Mapping[str, Run], encoder: CutEncoder, folder: Path | None) -> Row:
    net: PeftModel | None = None
    # All have the one adapter, as it is at the moment, and each has the head of its task, which nothing trains again.
    modules: dict[str, ShotsClassifier] = {}
    train_losses: list[float] = []
    after: dict[str, dict[str, Row]] = {}
    scores: Row = {}
    for task, of_task in runs.items():
        modules[task] = trained(of_task, encoder, net)
        net = modules[task].net
        own = judged_after_training(of_task, modules[task], encoder)
        by_task = {}
        for seen, module in modules.items():
            by_task[seen] = own if seen == task else judged_again(runs[seen], module, encoder)
        scores = means(by_task)
        if scores["failed"]:
            return scores
        train_losses.append(own["train_loss"])
        after[str(len(modules))] = short(by_task)
    row = {**scores, "train_loss": statistics.mean(train_losses), "after": after}
    if folder is not None and run.stage == "test":
        heads = nn.ModuleDict({task: module.head for task, module in modules.items()})
        row["weights"] = keep(nn.ModuleDict({"adapter": modules[task].net, "heads": heads}), run.key(), folder)
    return row
