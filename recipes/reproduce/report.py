"""A table's text: the plan before it starts, and the figures of what has been run next to the published ones."""

import statistics
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from recipes.reproduce.methods import BASELINE, METHODS, same_run
from recipes.reproduce.plan import Plan
from recipes.reproduce.run import Part, Run
from recipes.reproduce.table import Metric
from recipes.studies.rows import Row
from recipes.studies.statistics import mean_cell
from recipes.studies.tables import markdown


def plan_text(plan: Plan) -> str:
    """Describe runs, steps and downloads, and how settings are chosen."""
    table = plan.table
    lines = [["task", "trials of each method", "runs that choose", "final runs", "optimizer steps"]]
    for task in plan.tasks:
        numbers = " / ".join(str(_trials(plan, task, method)) for method in plan.methods)
        counts = count(plan, [task])
        lines.append([table.tasks[task].title, numbers, *map(str, counts[:2]), f"{counts.steps:,}"])
    counts = count(plan, plan.tasks)
    lines.append(["all", "", *map(str, counts[:2]), f"{counts.steps:,}"])
    downloads = dict.fromkeys(chain.from_iterable(table.tasks[task].downloads for task in plan.tasks))
    paragraphs = [
        f"{table.title}, by recipes.{table.recipe}.",
        f"Methods: {', '.join(plan.methods)}. Seeds: {', '.join(map(str, plan.seeds))}; "
        f"that of the choice: {table.tuning_seed}.",
        markdown(lines),
        *_choice_paragraphs(plan),
        f"Done: {len(_done(plan))}. {len(plan.open_runs())} runs may start now. {time_left(plan)}",
        f"To download: {'; '.join(downloads) or 'nothing'}.",  # names of configurations follow a comma
        *table.notes,
    ]
    return "\n\n".join(paragraphs)


def time_left(plan: Plan) -> str:
    """Say how long one process trains for all that is left, by the time per step of the runs so far."""
    rows = _done(plan).values()
    steps_done = sum(row["steps"] for row in rows)
    if not steps_done:
        return "How long they take is known when some are done."
    pace = sum(row["training_seconds"] for row in rows) / steps_done
    hours = pace * max(0, count(plan, plan.tasks).steps - steps_done) / 3600
    return f"At the pace of the runs so far, at most {hours:.1f} h of training are left for one process."


def _done(plan: Plan) -> dict[str, Row]:
    """Return the rows of the plan's runs that are done, by the runs' names."""
    rows = {}
    for run in plan.runs():
        row = plan.queue.find(run)
        if row is not None:
            rows[run.name] = row
    return rows


def _choice_paragraphs(plan: Plan) -> list[str]:
    table = plan.table
    if table.keeps == "nothing":
        return ["Nothing is chosen: the settings are fixed, since they do not change what a step costs."]
    paragraphs = []
    if plan.protocol == "paper":
        paragraphs.append(
            "Protocol of the paper: the learning rate of each task is fixed, LoRA is not tuned, and rho is chosen on "
            "validation data if the paper does not state it."
        )
    else:
        rates = ", ".join(f"{rate:g}" for rate in table.learning_rates)
        choice = [f"Chosen on validation data: the learning rate, of {rates}, together with", ""]
        for method in plan.methods:
            values = ", ".join(f"{value:g}" for value in table.grids[METHODS[method].grid])
            choice.append(f"- {METHODS[method].title}: {METHODS[method].parameter}, of {values}")
        paragraphs.append("\n".join(choice))
    paragraphs.append(
        "A trial with rho, sigma or alpha = 0 is a run of plain LoRA, which is done once for all methods. If 0 is "
        "chosen, the final runs are LoRA's too, so that fewer are needed."
    )
    if table.trial_steps is not None:
        paragraphs.append(f"Runs that choose have at most {table.trial_steps:,} steps.")
    return paragraphs


def _trials(plan: Plan, task: str, method: str) -> int:
    number = len(plan.configurations(task, method))
    return number if number > 1 else 0


class Counts(NamedTuple):
    """How much there is to do, at most.

    Attributes:
        choosing: runs that choose.
        final: runs that are tested; fewer if a size of 0 is chosen.
        steps: optimizer steps of all these runs.
    """

    choosing: int
    final: int
    steps: int


def count(plan: Plan, tasks: Sequence[str]) -> Counts:
    """Count the runs of some of a plan's tasks."""
    choosing, steps = 0, 0
    of_task = len(plan.methods) * len(plan.seeds)
    for task in tasks:
        number = _choosing_runs(plan, task)
        choosing += number
        steps += number * _steps(plan, task, "validation") + of_task * _steps(plan, task, "test")
    return Counts(choosing, of_task * len(tasks), steps)


def _choosing_runs(plan: Plan, task: str) -> int:
    """Count the runs that choose, for all methods; those that several methods share count once."""
    runs = []
    for method in plan.methods:
        if _trials(plan, task, method):
            runs += [same_run(method, config, plan.table.grids) for config in plan.configurations(task, method)]
    # If they start from another task's adapter, runs of size 0 start from each method's own.
    is_shared = plan.table.tasks[task].start is None
    # A set of the texts, since configurations are dictionaries.
    different = {str(run) for run in runs} if is_shared else runs
    return len(different)


def _steps(plan: Plan, task: str, part: Part) -> int:
    return Run(task, BASELINE, {}, 0, part, plan.table).steps


def table_text(plan: Plan) -> str:
    """Show means and standard errors of the tests, published figures, and what was chosen."""
    table = plan.table
    columns = _columns(plan)
    lines = [["", *(f"{table.tasks[task].title} {metric.title}".strip() for task, metric in columns), "average"]]
    for method in plan.methods:
        lines.append([METHODS[method].title, *_cells(plan, method)])
    for row in table.published:
        cells = [row.values.get(metric.key(task), "") for task, metric in columns]
        # A published average is over all tasks, and does not fit a table of some of them.
        average = row.values.get("average", "") if set(plan.tasks) == set(table.tasks) else ""
        if any(cells) or average:
            lines.append([f"*published:* {row.name}", *cells, average])
    # No row has an average: the column goes.
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    chosen = [["settings", *(table.tasks[task].title for task in plan.tasks)]]
    for method in plan.methods:
        chosen.append([METHODS[method].title, *(_chosen(plan, task, method) for task in plan.tasks)])
    paragraphs = [
        f"**{table.title}**",
        *_given_options(plan),
        markdown(lines),
        f"Test {table.unit}, mean ± standard error over seeds (number of seeds).",
        markdown(chosen),
        *(["*: at an end of its grid, so a better value may lie beyond."] if "*" in str(chosen) else []),
        *_choice_paragraphs(plan),
        _provenance(plan),
        *(f"{row.name}: {row.source}." for row in table.published),
        *table.notes,
    ]
    return "\n\n".join(paragraphs) + "\n"


def _columns(plan: Plan) -> list[tuple[str, Metric]]:
    columns = []
    for task in plan.tasks:
        columns += [(task, metric) for metric in plan.table.tasks[task].metrics]
    return columns


def _cells(plan: Plan, method: str) -> list[str]:
    """Return a method's cells, and its average over the tasks if each of several tasks has one metric."""
    cells = []
    means = []
    for task, metric in _columns(plan):
        values = _values(plan, task, method, metric)
        cells.append(mean_cell(values, metric.digits))
        if values and not metric.title:
            means.append(statistics.mean(values))
    # A mean over several metrics of a task, or over only some tasks, is comparable to nothing.
    has_average = len(means) == len(cells) > 1
    return [*cells, f"{statistics.mean(means):.1f}" if has_average else ""]


def _values(plan: Plan, task: str, method: str, metric: Metric) -> list[float]:
    values = _found(plan, task, method, metric)
    if not metric.is_relative:
        return [metric.factor * value for value in values]
    baseline = _found(plan, task, BASELINE, metric) if BASELINE in plan.methods else []
    return [value / statistics.mean(baseline) for value in values] if baseline else []


def _found(plan: Plan, task: str, method: str, metric: Metric) -> list[float]:
    found = []
    for run in plan.finals(task, method):
        row = plan.queue.find(run)
        if row is None:
            continue
        value = row["metrics"].get(f"test_{metric.name}", row.get(metric.name))
        if value is not None:
            found.append(value)
    return found


def _chosen(plan: Plan, task: str, method: str) -> str:
    """Describe a configuration; a mark shows a value at an end of its grid, beyond which a better one may lie."""
    chosen = plan.chosen(task, method)
    if chosen is None:
        return "-"
    described = []
    for name, value in chosen.items():
        grid = {config[name] for config in plan.configurations(task, method)}
        # Nothing lies beyond 0.
        is_end = len(grid) > 1 and (value == max(grid) or value == min(grid) != 0)
        described.append(f"{name} {value:g}{'*' * is_end}")
    return ", ".join(described)


def _given_options(plan: Plan) -> list[str]:
    """Return options that were given to the runs, such as another model, which the title does not name."""
    given = {" ".join(row.get("options", ())) for row in _done(plan).values()}
    return [f"**Run with other settings than these: `{options}`.**" for options in sorted(given) if options]


def _provenance(plan: Plan) -> str:
    """Say how many runs are done, on which devices, in which precision and at which commits."""
    rows = _done(plan)
    if not rows:
        return "No run is done yet."
    hours = sum(row["training_seconds"] for row in rows.values()) / 3600
    found = [f"{len(rows)} runs, {hours:.1f} h of training"]
    for name in ("device", "precision", "commit"):
        values = sorted({str(row[name]) for row in rows.values()})
        found.append(f"{name}: {', '.join(values)}")
    return f"{'; '.join(found)}."
