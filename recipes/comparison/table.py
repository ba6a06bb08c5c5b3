"""The comparison's tables: one for each task, one over all tasks; in the terminal and as Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Console

from recipes.clip_demo.run import Row
from recipes.comparison.methods import ALL
from recipes.comparison.summary import (
    BASELINE,
    Estimate,
    Outcome,
    corrected_p_values,
    outcomes,
    sharpness_correlation,
    told_seeds,
)
from recipes.comparison.task import all_settings

_COLUMNS = (
    "method", "chosen", "accuracy in %", "gain over LoRA", "p (Holm)", "test loss", "test loss - LoRA's", "train loss",
    "sharpness", "sharpness x LoRA", "step x LoRA",
)  # fmt: skip
_SHORT = {"learning_rate": "rate", "weight_decay": "decay"}


@dataclass(frozen=True)
class Table:
    """A table that can be shown in two ways.

    Attributes:
        title: above it.
        columns: their names.
        rows: the cells.
        notes: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """For a document."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *map(_line, self.rows), "", *(f"- {note}" for note in self.notes), ""])

    def show(self, console: Console) -> None:
        """In the terminal."""
        shown = rich.table.Table(title=self.title)
        for place, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if place else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown, *self.notes, "", sep="\n")


def tables(rows: Sequence[Row]) -> list[Table]:
    """Of each task in the order in which they were begun, and two over all of them."""
    found = {task: outcomes(rows, task) for task in dict.fromkeys(row["task"] for row in rows)}
    done = {task: own for task, own in found.items() if own}
    return [*(_of_task(task, own) for task, own in done.items()), _losses(done), _over_all(done)]


def _of_task(task: str, found: Sequence[Outcome]) -> Table:
    seeds = max(len(outcome.runs) for outcome in found)
    settings = all_settings(next(iter(found[0].runs.values()))["settings"])  # the same of all runs
    notes = [f"computed in {settings['precision']}"]
    notes += [f"{o.method}: the chosen value is the {o.edge} of its grid" for o in found if o.edge]
    for name in ("sharpness", "expected_sharpness"):
        correlation = sharpness_correlation(found, name)
        if not math.isnan(correlation):
            told = f"{name.replace('_', ' ')} and test error within the seeds"
            notes.append(f"{told}: Spearman's rank correlation {correlation:.2f}")
    return Table(f"{task}, {seeds} seeds", _COLUMNS, [_cells(outcome, seeds) for outcome in found], notes)


def _cells(outcome: Outcome, seeds: int) -> list[str]:
    inherited = {"learning_rate"} if ALL[outcome.method].start else set()
    own = {_SHORT.get(name, name): value for name, value in outcome.config.items() if name not in inherited}
    chosen = ", ".join(f"{name} {value:g}" for name, value in own.items())
    loss, train_loss = ("" if v is None else f"{v:.3f}" for v in map(outcome.mean, ("loss", "train_loss")))
    sharpness = [outcome.mean("sharpness"), outcome.mean("full_sharpness")]
    return [
        told_seeds(outcome, seeds),
        chosen + " (edge)" * bool(outcome.edge),
        _with_error(outcome.accuracy),
        _with_error(outcome.gain, "+.1f"),
        "" if outcome.p_holm is None else f"{outcome.p_holm:.3f}",
        loss,
        _with_error(outcome.excess_loss, "+.3f"),
        train_loss,
        next((f"{value:.3f}{mark}" for value, mark in zip(sharpness, ("", "*"), strict=True) if value is not None), ""),
        _sharpness_ratio(outcome),
        "" if outcome.cost is None else f"{outcome.cost:.2f}",
    ]


def _sharpness_ratio(outcome: Outcome) -> str:
    """Median and range over the seeds."""
    ratios = outcome.sharpness_ratios
    if not ratios or outcome.method == BASELINE:
        return ""
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _over_all(done: dict[str, list[Outcome]]) -> Table:
    """LoRA's accuracy and the other methods' gains, a column for each task; means over all tasks."""
    significant = {key for key, p in corrected_p_values(done).items() if p < 0.05}

    def gain(outcome: Outcome, task: str) -> str:
        told = _with_error(outcome.gain, "+.1f") or _with_error(outcome.accuracy)
        return f"[{told}]" if (task, outcome.method) in significant else told

    notes = [
        "lora: accuracy in %; the others: gain over LoRA in percentage points, mean ± standard error",
        "in brackets where p < 0.05 after Holm's correction over all tests of the table (variants by themselves)",
    ]
    return _by_task("all tasks", done, gain, lambda outcome: outcome.gain, "+.2f", notes)


def _losses(done: dict[str, list[Outcome]]) -> Table:
    """The same of the loss on the test part."""

    def loss(outcome: Outcome, task: str) -> str:
        return _with_error(outcome.excess_loss, "+.3f") or f"{outcome.mean('loss'):.3f}"

    notes = ["lora: loss on the test part in nats; the others: minus LoRA's, mean ± standard error; less is better"]
    return _by_task("all tasks, test loss", done, loss, lambda outcome: outcome.excess_loss, "+.3f", notes)


def _by_task(
    title: str,
    done: dict[str, list[Outcome]],
    cell: Callable[[Outcome, str], str],
    value: Callable[[Outcome], Estimate | None],
    form: str,
    notes: Sequence[str],
) -> Table:
    compared = {task: {o.method: o for o in own if o.gain or o.method == BASELINE} for task, own in done.items()}
    rows = []
    for method in ALL:
        own = [found[method] for found in compared.values() if method in found]
        if not own:
            continue
        cells = [cell(found[method], task) if method in found else "" for task, found in compared.items()]
        values = [estimate.mean for outcome in own if (estimate := value(outcome))]
        mean = f"{statistics.mean(values):{form}}" if values and len(own) == len(compared) else ""
        cost = statistics.geometric_mean([outcome.cost for outcome in own if outcome.cost])
        rows.append([method, *cells, mean, f"{cost:.2f}"])
    return Table(title, ("method", *compared, "mean", "step x LoRA"), rows, notes)


def _with_error(value: Estimate | None, form: str = ".1f") -> str:
    if value is None:
        return ""
    error = "" if math.isnan(value.error) else f" ± {value.error:{form.removeprefix('+')}}"
    return f"{value.mean:{form}}{error}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
