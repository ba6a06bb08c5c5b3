"""What merging keeps of each arm's accuracy: by way to merge, by task, and by the number of adapters."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from recipes.evidence.arms_report import Measure, before_and_after_table, kept_figure, kept_table, with_adapters
from recipes.evidence.merging import PRIMARY_WAY, WAYS, fewer_than
from recipes.evidence.verdict import BySeed
from recipes.evidence.workloads import TITLES, Settings
from recipes.shared.ledger import Row
from recipes.shared.tables import Table

_SINGLE = "single"
_TITLES = {
    _SINGLE: "before merging",
    "average": "average",
    "task_arithmetic": "task arithmetic",
    PRIMARY_WAY: "TIES",
}


def merging_tables(workload: str, settings: Settings, rows: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Tables of the runs on the test part, by arm."""
    arms = with_adapters(rows)
    if not arms:
        return []
    tasks = list(settings["tasks"])
    ways = {_TITLES[way]: partial(_of_way, way=way, tasks=tasks) for way in (_SINGLE, *WAYS)}
    note = "means over the tasks; TIES is the primary outcome, all else is secondary"
    by_task: dict[str, tuple[Measure, Measure]] = {}
    for task in tasks:
        by_task[task] = partial(_of_way, way=_SINGLE, tasks=[task]), partial(_of_way, way=PRIMARY_WAY, tasks=[task])
    return [
        kept_table(f"{workload}, test accuracy in % by way to merge", arms, ways, [note]),
        before_and_after_table(f"{workload}, test accuracy in % before and after merging by TIES", arms, by_task),
        _by_number(workload, arms, tasks),
    ]


def merging_figure(workload: str, settings: Settings, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Accuracy against the number of adapters that are merged by TIES, beside that of the same adapters alone."""
    tasks = list(settings["tasks"])
    alone: dict[float, Measure] = {}
    together: dict[float, Measure] = {}
    for number in (*fewer_than(tasks), len(tasks)):
        alone[number] = partial(_of_way, way=_SINGLE, tasks=tasks[:number])
        together[number] = partial(_of_first, number=number, tasks=tasks)
    return kept_figure(
        f"{workload}: mean over the merged tasks, 95 % intervals over the seeds",
        "merged adapters",
        with_adapters(rows),
        {"before merging": alone, "merged by TIES": together},
    )


def kept(rows: Sequence[Row], group: str, way: str, tasks: Sequence[str]) -> BySeed:
    """Mean test accuracy over tasks by seed, in percent; a run that has failed has the accuracy of chance.

    Args:
        rows: of one arm.
        group: "single", "merged" or "fewer", an entry of the rows.
        way: its entry that is wanted; "single" has none, and ignores it.
        tasks: over which the mean is taken.
    """
    found = {}
    for row in rows:
        accuracies = [row["chance"]]
        if not row["failed"]:
            by_task = row[group] if group == _SINGLE else row[group][way]
            accuracies = [by_task[task]["test_accuracy"] for task in tasks]
        found[row["seed"]] = 100 * statistics.mean(accuracies)
    return found


def _of_way(rows: Sequence[Row], way: str, tasks: Sequence[str]) -> BySeed:
    return kept(rows, _SINGLE if way == _SINGLE else "merged", way, tasks)


def _of_first(rows: Sequence[Row], number: int, tasks: Sequence[str]) -> BySeed:
    """Of the first so many adapters, merged by TIES."""
    if number == len(tasks):
        return _of_way(rows, PRIMARY_WAY, tasks)
    return kept(rows, "fewer", str(number), tasks[:number])


def _by_number(workload: str, arms: Mapping[str, Sequence[Row]], tasks: Sequence[str]) -> Table:
    numbers = (*fewer_than(tasks), len(tasks))
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for number in numbers:
            before = statistics.mean(_of_way(rows, _SINGLE, tasks[:number]).values())
            after = statistics.mean(_of_first(rows, number, tasks).values())
            line.append(f"{after:.1f} ({after - before:+.1f})")
        lines.append(line)
    columns = ["arm", *(f"{number} adapters" for number in numbers)]
    note = "the first so many tasks are merged by TIES and judged; in brackets: minus the same adapters before merging"
    return Table(f"{workload}, test accuracy in % by the number of merged adapters", columns, lines, [note])
