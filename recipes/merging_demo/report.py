"""The demo's table, its picture, and what they say in a sentence."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from recipes.merging_demo.run import EFMLORA, FROZEN, LORA, SMALL_WITH_DROPOUT, WAYS
from recipes.shared.ledger import Row
from recipes.shared.methods import COLOURS
from recipes.shared.statistics import Estimate, estimate, with_error, with_interval
from recipes.shared.tables import Table

BySeed = Mapping[int, float]
BEFORE = "before merging"
_OTHERS = "#bbbbbb"


def table(rows: Sequence[Row]) -> Table:
    """Test accuracy of each method in %, before merging and by each way to merge."""
    lines = []
    for arm in _with_adapters(rows):
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


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy of each method before and after merging by TIES, with 95 % intervals over the seeds."""
    arms = _with_adapters(rows)
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes = drawn.subplots()
    colours = [COLOURS.get(arm, _OTHERS) for arm in arms]
    for place, (way, alpha) in enumerate(((BEFORE, 0.5), ("TIES", 1.0))):
        found = [estimate(list(accuracies(rows, arm, way).values())) for arm in arms]
        axes.bar(
            [number + 0.4 * place for number in range(len(arms))],
            [one.mean for one in found],
            yerr=[one.interval for one in found],
            width=0.38,
            color=colours,
            alpha=alpha,
            capsize=4,
        )
    frozen = statistics.mean(accuracies(rows, FROZEN, BEFORE).values())
    axes.axhline(frozen, color="#666666", linestyle="--", label=FROZEN)
    axes.set_xticks([number + 0.2 for number in range(len(arms))], [arm.replace(", ", ",\n") for arm in arms])
    axes.set(ylabel="mean test accuracy in %", title="pale: before merging; full: merged by TIES", ylim=(50, None))
    axes.legend(loc="lower right")
    return drawn


def sentence(rows: Sequence[Row]) -> str:
    """What EFMLoRA has gained here, over what, and where the settings come from."""
    own = accuracies(rows, EFMLORA, "TIES")
    found = []
    for arm, way in ((LORA, "TIES"), (SMALL_WITH_DROPOUT, "TIES"), (FROZEN, BEFORE)):
        found.append(f"minus {arm} {with_interval(difference(own, accuracies(rows, arm, way)))}")
    return (
        f"EFMLoRA after merging by TIES, in points of accuracy, {len(own)} seeds: {'; '.join(found)}. Rates, dropout "
        "and rho come from the search of W3 in docs/evidence.md, which also says where nothing is gained."
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


def _with_adapters(rows: Sequence[Row]) -> list[str]:
    arms = dict.fromkeys(row["arm"] for row in rows)
    return [arm for arm in arms if arm != FROZEN]
