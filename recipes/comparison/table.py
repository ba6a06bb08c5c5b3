"""The comparison's tables: one for each task, one over all tasks; in the terminal and as Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence

from recipes.comparison.methods import ALL
from recipes.comparison.summary import (
    BASELINE,
    Outcome,
    corrected_p_values,
    name_with_seeds,
    outcomes,
    sharpness_correlation,
)
from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate, with_error
from recipes.shared.tables import Table, settings_text

_COLUMNS = (
    "method", "chosen", "accuracy in %", "gain over LoRA", "p (Holm)", "test loss", "test loss - LoRA's", "train loss",
    "sharpness", "sharpness x LoRA", "step x LoRA",
)  # fmt: skip


def tables(rows: Sequence[Row]) -> list[Table]:
    """Of each task in the order in which they were begun, and two over all of them."""
    done = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        task_outcomes = outcomes(rows, task)
        if task_outcomes:
            done[task] = task_outcomes
    return [*(_of_task(task, own) for task, own in done.items()), _losses(done), _over_all(done)]


def _of_task(task: str, task_outcomes: Sequence[Outcome]) -> Table:
    seeds = max(len(outcome.runs) for outcome in task_outcomes)
    settings = next(iter(task_outcomes[0].runs.values()))["settings"]  # the same of all runs
    notes = [f"computed in {settings['precision']}"]
    notes += [f"{o.method}: the chosen value is the {o.edge} of its grid" for o in task_outcomes if o.edge]
    for name in ("sharpness", "expected_sharpness"):
        correlation = sharpness_correlation(task_outcomes, name)
        if not math.isnan(correlation):
            pair = f"{name.replace('_', ' ')} and test error within the seeds"
            notes.append(f"{pair}: Spearman's rank correlation {correlation:.2f}")
    return Table(f"{task}, {seeds} seeds", _COLUMNS, [_cells(outcome, seeds) for outcome in task_outcomes], notes)


def _cells(outcome: Outcome, seeds: int) -> list[str]:
    inherited = {"learning_rate"} if ALL[outcome.method].start else set()
    chosen = settings_text({name: value for name, value in outcome.config.items() if name not in inherited})
    sharpness = _short(outcome.mean("sharpness"))
    if not sharpness and outcome.mean("full_sharpness") is not None:
        sharpness = _short(outcome.mean("full_sharpness")) + "*"
    return [
        name_with_seeds(outcome, seeds),
        f"{chosen} (edge)" if outcome.edge else chosen,
        _with_error(outcome.accuracy),
        _with_error(outcome.gain, "+.1f"),
        _short(outcome.p_holm),
        _short(outcome.mean("loss")),
        _with_error(outcome.excess_loss, "+.3f"),
        _short(outcome.mean("train_loss")),
        sharpness,
        _sharpness_ratio(outcome),
        "" if outcome.cost is None else f"{outcome.cost:.2f}",
    ]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


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
        shown = _with_error(outcome.gain, "+.1f") or _with_error(outcome.accuracy)
        return f"[{shown}]" if (task, outcome.method) in significant else shown

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
    compared = {}
    for task, outcomes_of_task in done.items():
        compared[task] = {o.method: o for o in outcomes_of_task if o.gain or o.method == BASELINE}
    rows = []
    for method in ALL:
        of_method = [by_method[method] for by_method in compared.values() if method in by_method]
        if not of_method:
            continue
        cells = [cell(by_method[method], task) if method in by_method else "" for task, by_method in compared.items()]
        estimates = [value(outcome) for outcome in of_method]
        values = [estimate.mean for estimate in estimates if estimate]
        mean = f"{statistics.mean(values):{form}}" if values and len(of_method) == len(compared) else ""
        cost = statistics.geometric_mean([outcome.cost for outcome in of_method if outcome.cost])
        rows.append([method, *cells, mean, f"{cost:.2f}"])
    return Table(title, ("method", *compared, "mean", "step x LoRA"), rows, notes)


def _with_error(value: Estimate | None, form: str = ".1f") -> str:
    return "" if value is None else with_error(value, form)
