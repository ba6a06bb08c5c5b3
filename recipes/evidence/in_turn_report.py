"""What each arm's adapter still knows of the tasks that it has learned before: tables and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from recipes.evidence.arms_report import Measure, before_and_after_table, kept_figure, kept_table, with_adapters
from recipes.evidence.verdict import BySeed
from recipes.evidence.workloads import Settings
from recipes.shared.ledger import Row
from recipes.shared.tables import Table

Moments = Mapping[str, int]
"""By task, how many tasks had been learned when it was judged."""


def in_turn_tables(workload: str, settings: Settings, rows: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Tables of the runs on the test part, by arm."""
    arms = with_adapters(rows)
    if not arms:
        return []
    tasks = list(settings["tasks"])
    learned, at_end = _when_learned(tasks), dict.fromkeys(tasks, len(tasks))
    measures: dict[str, Measure] = {
        "right after learning": partial(accuracy, moments=learned),
        "at the end": partial(accuracy, moments=at_end),
        "forgetting": partial(forgetting, tasks=tasks),
    }
    notes = [
        "forgetting: the points of accuracy that all tasks but the last one have lost since each was learned; without "
        "runs that have failed",
        "means over the tasks; the accuracy at the end is the outcome; all of this is secondary",
    ]
    by_task: dict[str, tuple[Measure, Measure]] = {}
    for task in tasks:
        by_task[task] = (
            partial(accuracy, moments={task: learned[task]}),
            partial(accuracy, moments={task: at_end[task]}),
        )
    title = f"{workload}, test accuracy in % right after learning and at the end"
    return [
        kept_table(f"{workload}, test accuracy in % and forgetting in points", arms, measures, notes),
        before_and_after_table(title, arms, by_task),
    ]


def in_turn_figure(workload: str, settings: Settings, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Accuracy on all tasks before the last one learned, against the number of tasks learned."""
    tasks = list(settings["tasks"])
    learned: dict[float, Measure] = {}
    now: dict[float, Measure] = {}
    for number in range(2, len(tasks) + 1):
        earlier = tasks[: number - 1]
        learned[number] = partial(accuracy, moments=_when_learned(earlier))
        now[number] = partial(accuracy, moments=dict.fromkeys(earlier, number))
    return kept_figure(
        f"{workload}: mean over the tasks before the last one learned, 95 % intervals over the seeds",
        "tasks learned",
        with_adapters(rows),
        {"right after each was learned": learned, "after all of these tasks": now},
    )


def accuracy(rows: Sequence[Row], moments: Moments) -> BySeed:
    """Mean test accuracy over some tasks by seed, in percent; a run that has failed has the accuracy of chance."""
    found = {}
    for row in rows:
        accuracies = [row["chance"]]
        if not row["failed"]:
            accuracies = [row["after"][str(number)][task]["test_accuracy"] for task, number in moments.items()]
        found[row["seed"]] = 100 * statistics.mean(accuracies)
    return found


def forgetting(rows: Sequence[Row], tasks: Sequence[str]) -> BySeed:
    """Mean loss of test accuracy from right after learning to the end, over all tasks but the last, in points.

    Runs that have failed are left out: at chance from the beginning, they would count as forgetting nothing.
    """
    finished = [row for row in rows if not row["failed"]]
    earlier = tasks[:-1]
    before = accuracy(finished, _when_learned(earlier))
    at_end = accuracy(finished, dict.fromkeys(earlier, len(tasks)))
    return {seed: before[seed] - at_end[seed] for seed in before}


def _when_learned(tasks: Sequence[str]) -> Moments:
    return {task: number for number, task in enumerate(tasks, 1)}
