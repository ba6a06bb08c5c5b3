"""A table of the paper: its tasks, the recipe that trains on them, values to choose from, and published figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from recipes.reproduce.methods import DEFAULT

Protocol = Literal["tuned", "paper"]
USUAL_GRIDS = {
    "rho": (0.0, 0.05, 0.1, 0.2),
    "lora_rho": (0.0, 0.05, 0.1, 0.2),
    "sigma": (0.0, 0.05, 0.1, 0.2),
    "alpha": (0.0, 0.5, 2.0, 8.0),
}
"""Values of the methods' settings; for rho, those that are usually tried for SAM, and 0."""


@dataclass(frozen=True)
class Metric:
    """A metric that the table shows.

    Attributes:
        name: a metric that the recipe logs as ``test_…``, or an entry of the rows.
        title: comes after the task's title in the table's head; empty if a task has one metric.
        factor: factor for display, 100 for a share.
        digits: digits after the decimal point.
        is_relative: show the value relative to LoRA's mean.
    """

    name: str = "score"
    title: str = ""
    factor: float = 100.0
    digits: int = 1
    is_relative: bool = False

    def key(self, task: str) -> str:
        """Return the name of the task's column with this metric, which is also the key of published figures."""
        return f"{task} {self.title}".strip()


@dataclass(frozen=True)
class Task:
    """A task of a table, with a column for each of its metrics.

    Attributes:
        title: title in the table.
        configs: YAML files that overlay the recipe's base, in the recipe's folder ``configs``.
        steps: optimizer steps of a whole run; an estimate if the recipe counts epochs.
        downloads: required downloads, for example Hub names.
        learning_rate: the protocol's rate, for ``--protocol paper``.
        rho: the paper's for EFMLoRA and FMLoRA; None if the paper does not state it.
        options: further arguments of the recipe.
        metrics: metrics that the table shows.
        start: another task of the table, from whose adapter a run starts: the same method's with the same seed.
    """

    title: str
    configs: Sequence[str]
    steps: int
    downloads: Sequence[str]
    learning_rate: float
    rho: float | None = None
    options: Sequence[str] = ()
    metrics: Sequence[Metric] = (Metric(),)
    start: str | None = None


@dataclass(frozen=True)
class Published:
    """Figures published by others, for comparison.

    Attributes:
        name: the method, and who ran it.
        source: publication of the figures.
        values: figures as published, by the keys of the metrics; "average" is over all tasks.
    """

    name: str
    source: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table: what is run, how settings are chosen, and what has been published.

    Attributes:
        name: name on the command line.
        title: title for readers.
        recipe: name of the recipe's folder.
        tasks: its columns.
        learning_rates: rates to choose from.
        grids: values of each method's own setting to choose from, by the names in :mod:`recipes.reproduce.methods`;
            equally many for each, with 0 among them except for dropout, whose first value is the recipe's.
        seeds: seeds of the runs that are tested.
        seed_options: arguments of the recipe that the seed sets.
        tuning_seed: seed of the runs that choose, not one of ``seeds``.
        choice: the metric to choose by, logged as ``val_…``: the greatest value, or for "loss" the least.
        unit: unit of the table's figures.
        keeps: which checkpoint is tested: the best one by the recipe's own monitor, which must be ``choice``, or the
            last one; "nothing" for a table of training costs.
        precision: precision of all runs; None is the device's fast one, and "recipe" the recipe's own.
        methods: methods to compare, unless others are named.
        trial_steps: most optimizer steps of a run that chooses; None runs all of them.
        published: rows for comparison.
        notes: differences to the paper's table.
    """

    name: str
    title: str
    recipe: str
    tasks: Mapping[str, Task]
    learning_rates: Sequence[float]
    grids: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    seed_options: Sequence[str]
    tuning_seed: int = 7
    choice: str = "score"
    unit: str = "accuracy in %"
    keeps: Literal["best", "last", "nothing"] = "best"
    precision: Literal["recipe"] | None = None
    methods: Sequence[str] = DEFAULT
    trial_steps: int | None = None
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    def with_starts(self, tasks: Sequence[str]) -> list[str]:
        """Return these tasks and those that they start from, each after its start, in the table's order."""
        wanted = {*tasks, *(self.tasks[name].start for name in tasks)}
        ordered = [name for name in self.tasks if name in wanted]
        return sorted(ordered, key=lambda name: self.tasks[name].start is not None)


def _read(path: Path) -> Table:
    """Read a table from its file; ``task`` there holds what all tasks share, and its lists are added to theirs."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    common = found.pop("task")
    return Table(
        name=path.stem,
        tasks={name: _task(common, own) for name, own in found.pop("tasks").items()},
        grids={**USUAL_GRIDS, **found.pop("grids")},
        published=[Published(**row) for row in found.pop("published", [])],
        **found,
    )


def _task(common: dict[str, Any], own: dict[str, Any]) -> Task:
    merged = {**common, **own}
    for name in ("configs", "downloads", "options"):
        merged[name] = [*common.get(name, []), *own.get(name, [])]
    if "metrics" in merged:
        merged["metrics"] = [Metric(**metric) for metric in merged["metrics"]]
    return Task(**merged)


TABLES: dict[str, Table] = {path.stem: _read(path) for path in sorted(Path(__file__).parent.glob("tables/*.yaml"))}
"""The tables by their names on the command line."""
