"""The table of a sweep: accuracies with the values that validation chose, beside published figures."""

import json
import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from recipes.clip_fewshot.plan import Sweep, accuracy, task
from recipes.shared.ledger import Row
from recipes.shared.methods import TITLES
from recipes.shared.statistics import mean_cell
from recipes.shared.tables import markdown
from recipes.studies.plan import Config, Part

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""Other people's figures by method: ``source``, and ``accuracy`` in % by data set and number of shots, a text."""


def tables(plan: Sweep, part: Part = "test") -> str:
    """Markdown: a table for each data set, of the runs that are done.

    Args:
        plan: of the sweep.
        part: whose accuracy: "test", with the values that validation chose, or "validation", with all.
    """
    shown = []
    for dataset in plan.datasets:
        tasks = [task(dataset, shots) for shots in plan.shots]
        rows = {method: _rows(plan, tasks, method) for method in plan.methods}
        if any(rows.values()):
            shown.append(_table(plan, tasks, rows, part))
    note = f"Accuracy in % on the {part} part, mean ± standard error (seeds); step time relative to LoRA's."
    if part == "test":
        note += " Values in brackets have the best validation accuracy of those that were run."
        for name, method in PUBLISHED.items():
            note += f" Published, {name}: {method['source']}." if f"{name}, published" in "".join(shown) else ""
    return "\n\n".join([*shown, note])


def _table(plan: Sweep, tasks: Sequence[str], rows: dict[str, list[Row]], part: Part) -> str:
    """A line for each method, accuracy over the seeds for each number of shots, and the step's relative time."""
    every = list(chain.from_iterable(rows.values()))
    lines = [["method", *(task(None, shots) for shots in plan.shots), "step time"]]
    if part == "test":
        lines += _published(every, plan.shots)
        zero_shot = statistics.mean(row["zero_shot"]["accuracy"] for row in every)
        lines.append(["zero-shot", *[f"{100 * zero_shot:.1f}"] * len(tasks), ""])
    base = _seconds(rows.get("lora", []))
    for method, of_method in rows.items():
        seconds = _seconds(of_method)
        relative = f"{seconds / base:.2f}" if seconds and base else "-"
        title = TITLES[method]
        if part == "test":
            lines.append([title, *(_chosen(plan, each, method) for each in tasks), relative])
            continue
        for config in plan.configurations(tasks[0], method):
            cells = [_cell(plan.rows(each, method, config), part) for each in tasks]
            lines.append([", ".join([title, *_shown(config)]), *cells, relative])
    return f"{every[0]['dataset']}:\n\n{markdown(lines)}"


def _rows(plan: Sweep, tasks: Sequence[str], method: str) -> list[Row]:
    found = []
    for each in tasks:
        for config in plan.configurations(each, method):
            found += plan.rows(each, method, config)
    return found


def _chosen(plan: Sweep, task: str, method: str) -> str:
    """The cell of the configuration that validation has chosen, which is named if there was a choice."""
    config = plan.chosen(task, method)
    if config is None:
        return "-"
    choice = f" [{', '.join(_shown(config))}]" if len(plan.configurations(task, method)) > 1 else ""
    return _cell(plan.rows(task, method, config), "test") + choice


def _cell(rows: Sequence[Row], part: Part) -> str:
    return mean_cell([100 * accuracy(row, part) for row in rows])


def _shown(config: Config) -> list[str]:
    return [f"{name} {value:g}" for name, value in config.items()]


def _published(rows: Sequence[Row], shots: Sequence[int]) -> list[list[str]]:
    """Lines of published figures, if the runs had the published parts."""
    lines = []
    for name, method in PUBLISHED.items():
        figures = method["accuracy"].get(rows[0]["dataset"])
        if figures and all(row["split"] == "coop" for row in rows):
            lines.append([f"{name}, published", *(str(figures.get(str(number), "-")) for number in shots), ""])
    return lines


def _seconds(rows: Sequence[Row]) -> float | None:
    seconds = [row["seconds_per_step"] for row in rows if row["seconds_per_step"]]
    return statistics.median(seconds) if seconds else None
