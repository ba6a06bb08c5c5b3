"""The best checkpoint and the last step, at each share of training labels that are replaced."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from matplotlib.figure import Figure

from recipes.evidence.arms_report import Measure, kept_figure, kept_table, with_adapters
from recipes.evidence.verdict import BySeed
from recipes.evidence.workloads import TITLES
from recipes.shared.ledger import Row
from recipes.shared.tables import Table

Moment = Literal["best", "last"]
"""The checkpoint that is best on validation, or the last step."""

_MOMENTS: dict[Moment, str] = {"best": "best on validation", "last": "last step"}


def noise_tables(workload: str, rows: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Tables of the runs on the test part, all of which are judged at their best on validation.

    Args:
        workload: whose labels are replaced.
        rows: of each arm, at all shares.
    """
    arms = with_adapters(rows)
    shares = shares_of(arms)
    if not shares:
        return []
    found = []
    for moment, title in _MOMENTS.items():
        measures: dict[str, Measure] = {}
        for share in shares:
            measures[_percent(share)] = partial(accuracy, share=share, moment=moment)
        note = "columns: the share of training labels that are replaced; the settings are the same at all shares"
        found.append(kept_table(f"{workload}, test accuracy in %, {title}", arms, measures, [note]))
    return [*found, _losses(workload, arms, shares)]


def noise_figure(workload: str, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Accuracy against the share; None where all runs have the same share."""
    arms = with_adapters(rows)
    shares = shares_of(arms)
    if len(shares) < 2:
        return None
    panels: dict[str, dict[float, Measure]] = {}
    for moment, title in _MOMENTS.items():
        panels[title] = {100 * share: partial(accuracy, share=share, moment=moment) for share in shares}
    return kept_figure(
        f"{workload}: mean and 95 % intervals over the seeds", "training labels replaced, in %", arms, panels
    )


def shares_of(rows: Mapping[str, Sequence[Row]]) -> list[float]:
    """The shares of replaced labels among the rows of all arms, from the lowest."""
    shares: set[float] = set()
    for of_arm in rows.values():
        shares.update(row["settings"]["noise"] for row in of_arm)
    return sorted(shares)


def accuracy(rows: Sequence[Row], share: float, moment: Moment) -> BySeed:
    """Test accuracy by seed at a share of replaced labels, in percent."""
    return {row["seed"]: 100 * _judged(row, moment)["test_accuracy"] for row in rows if _is_at(row, share)}


def _losses(workload: str, arms: Mapping[str, Sequence[Row]], shares: Sequence[float]) -> Table:
    lines = []
    for arm, rows in arms.items():
        line = [TITLES[arm]]
        for share in shares:
            means = [_mean_loss(rows, share, moment) for moment in _MOMENTS]
            line.append(" → ".join(means))
        lines.append(line)
    title = f"{workload}, test loss in nats, best on validation → last step"
    return Table(title, ["arm", *map(_percent, shares)], lines, ["without runs that have failed"])


def _mean_loss(rows: Sequence[Row], share: float, moment: Moment) -> str:
    losses = [_judged(row, moment)["test_loss"] for row in rows if _is_at(row, share)]
    finite = [loss for loss in losses if loss is not None]
    return f"{statistics.mean(finite):.3f}" if finite else "-"


def _is_at(row: Row, share: float) -> bool:
    return bool(row["settings"]["noise"] == share)


def _judged(row: Row, moment: Moment) -> Row:
    """A run that has failed has one judgement only, the accuracy of chance."""
    at_end: Row = row.get("at_end", row)
    return at_end if moment == "last" else row


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
