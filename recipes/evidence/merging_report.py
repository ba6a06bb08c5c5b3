"""What merging keeps of each arm's accuracy: by way to merge, by task, and by the number of adapters."""

import statistics
from collections.abc import Mapping, Sequence

from recipes.evidence.merging import FEWER, PRIMARY_WAY, WAYS
from recipes.evidence.verdict import difference
from recipes.evidence.workloads import BASELINE, PROBE, TITLES, Settings
from recipes.shared.ledger import Row
from recipes.shared.statistics import mean_cell
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
    arms = {arm: of_arm for arm, of_arm in rows.items() if arm != PROBE}
    if not arms:
        return []
    tasks = list(settings["tasks"])
    return [_by_way(workload, arms, tasks), _by_task(workload, arms, tasks), _by_number(workload, arms, tasks)]


def kept(rows: Sequence[Row], group: str, way: str, tasks: Sequence[str]) -> dict[int, float]:
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


def _of_way(rows: Sequence[Row], way: str, tasks: Sequence[str]) -> dict[int, float]:
    return kept(rows, _SINGLE if way == _SINGLE else "merged", way, tasks)


def _by_way(workload: str, arms: Mapping[str, Sequence[Row]], tasks: Sequence[str]) -> Table:
    ways = (_SINGLE, *WAYS)
    columns = ["arm"]
    for way in ways:
        columns += [_TITLES[way], "minus LoRA's"]
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for way in ways:
            own, base = _of_way(rows, way, tasks), _of_way(arms.get(BASELINE, ()), way, tasks)
            to_base = difference(own, base) if arm != BASELINE else None
            line += [mean_cell(list(own.values())), str(to_base or "")]
        lines.append(line)
    notes = [
        "mean over the tasks ± standard error over the seeds (seeds); differences: paired by seed, with 95 % intervals",
        "TIES is the primary outcome, all else is secondary",
    ]
    return Table(f"{workload}, test accuracy in % by way to merge", columns, lines, notes)


def _by_task(workload: str, arms: Mapping[str, Sequence[Row]], tasks: Sequence[str]) -> Table:
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for task in tasks:
            before, after = _of_way(rows, _SINGLE, [task]), _of_way(rows, PRIMARY_WAY, [task])
            line.append(f"{statistics.mean(before.values()):.1f} → {statistics.mean(after.values()):.1f}")
        lines.append(line)
    return Table(f"{workload}, test accuracy in % before and after merging by TIES", ["arm", *tasks], lines)


def _by_number(workload: str, arms: Mapping[str, Sequence[Row]], tasks: Sequence[str]) -> Table:
    columns = ["arm", *(f"{number} adapters" for number in (*FEWER, len(tasks)))]
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for number in FEWER:
            line.append(_change(rows, kept(rows, "fewer", str(number), tasks[:number]), tasks[:number]))
        line.append(_change(rows, _of_way(rows, PRIMARY_WAY, tasks), tasks))
        lines.append(line)
    note = "the first so many tasks are merged by TIES and judged; in brackets: minus the same adapters before merging"
    return Table(f"{workload}, test accuracy in % by the number of merged adapters", columns, lines, [note])


def _change(rows: Sequence[Row], after: Mapping[int, float], tasks: Sequence[str]) -> str:
    before = statistics.mean(kept(rows, _SINGLE, "", tasks).values())
    mean = statistics.mean(after.values())
    return f"{mean:.1f} ({mean - before:+.1f})"
