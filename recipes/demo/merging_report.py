"""The demo's table, and what it says in a sentence."""

import statistics
from collections.abc import Mapping, Sequence

from recipes.demo.merging_run import ARMS, FROZEN, SMALL_WITH_DROPOUT, WAYS
from recipes.demo.training import EFMLORA, LORA
from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate, estimate, with_error, with_interval
from recipes.shared.tables import Table

BySeed = Mapping[int, float]
BEFORE = "before merging"


def table(rows: Sequence[Row]) -> Table:
    """Test accuracy of each method in %, before merging and by each way to merge."""
    lines = []
    for arm in ARMS:
        if arm == FROZEN:
            continue
        line = [arm]
        for way in (BEFORE, *WAYS):
            line.append(with_error(estimate(list(accuracies(rows, arm, way).values()))))
        less = difference(accuracies(rows, arm, "TIES"), accuracies(rows, LORA, "TIES"))
        lines.append([*line, "" if arm == LORA else with_interval(less)])
    frozen = estimate(list(accuracies(rows, FROZEN, BEFORE).values()))
    notes = [
        "mean over the tasks ± standard error over the seeds; difference: paired by seed, with its 95 % interval",
        f"{FROZEN}, which has nothing to merge: {with_error(frozen)}",
    ]
    columns = ("method", BEFORE, *WAYS, "TIES minus LoRA's")
    return Table("Test accuracy in % before merging and by way to merge", columns, lines, notes)


def sentence(rows: Sequence[Row]) -> str:
    """What EFMLoRA has gained here, over what, and where the settings come from."""
    own = accuracies(rows, EFMLORA, "TIES")
    found = []
    for arm, way in ((LORA, "TIES"), (SMALL_WITH_DROPOUT, "TIES"), (FROZEN, BEFORE)):
        found.append(f"minus {arm} {with_interval(difference(own, accuracies(rows, arm, way)))}")
    return (
        f"EFMLoRA after merging by TIES, in points of accuracy, {len(own)} seeds: {'; '.join(found)}. Rates, dropout "
        "and rho come from the searches of docs/study.md. An audit of it found that LoRA does as well with separate "
        "learning rates for head and adapter."
    )


def accuracies(rows: Sequence[Row], arm: str, way: str) -> BySeed:
    """Mean over the tasks by seed, in percent, before merging or by a way to merge."""
    found = {}
    for row in rows:
        if row["arm"] == arm:
            by_task = row["single"] if way == BEFORE else row["merged"][way]
            found[row["seed"]] = 100 * statistics.mean(by_task.values())
    return found


def difference(own: BySeed, other: BySeed) -> Estimate:
    """Paired by seed."""
    return estimate([own[seed] - other[seed] for seed in own])
