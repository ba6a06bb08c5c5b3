"""What a table of the paper is: tasks, a recipe that trains on them, values to choose from, and published figures."""

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
"""Values of the methods' settings: of rho those that the literature usually tries for SAM, and 0."""


@dataclass(frozen=True)
class Metric:
    """What a cell shows.

    Attributes:
        name: a metric that the recipe logs as ``test_…``, or an entry of the rows.
        title: behind the task's in the head of the table; empty where a task has one metric.
        factor: that the value is shown with, 100 for a share.
        digits: behind the point.
        is_relative: show the value relative to the mean of LoRA's.
    """

    name: str = "score"
    title: str = ""
    factor: float = 100.0
    digits: int = 1
    is_relative: bool = False

    def key(self, task: str) -> str:
        """Return the name of the task's column with this metric, under which published figures stand."""
        return f"{task} {self.title}".strip()


@dataclass(frozen=True)
class Task:
    """A task of a table, with a column for each of its metrics.

    Attributes:
        title: what the table calls it.
        configs: YAML files that overlay the recipe's base, in the recipe's folder ``configs``.
        steps: optimizer steps of a whole run; an estimate where the recipe counts epochs.
        downloads: what must be downloaded, Hub names for example.
        learning_rate: that of the protocol, which ``--protocol paper`` takes.
        rho: that of the paper for EFMLoRA and FMLoRA; None where the paper is silent.
        options: more arguments of the recipe.
        metrics: that the table shows.
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
    """Somebody else's figures, for comparison.

    Attributes:
        name: of the method, and of who ran it.
        source: where the figures stand.
        values: figures as published, by the keys of the metrics; "average" is over all tasks.
    """

    name: str
    source: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table: what is run, how settings are chosen, and what has been published.

    Attributes:
        name: on the command line.
        title: for readers.
        recipe: name of the recipe's folder.
        tasks: its columns.
        learning_rates: to choose from.
        grids: values of each method's own setting to choose from, by the names in :mod:`recipes.reproduce.methods`;
            as many for each, 0 among them except for dropout, whose first value is the recipe's.
        seeds: of the runs that are tested.
        seed_options: what a seed decides: arguments of the recipe.
        tuning_seed: of the runs that choose, none of ``seeds``.
        choice: what is logged as ``val_…`` and chosen by: the greatest value, or of "loss" the least.
        unit: what the table shows.
        keeps: which checkpoint is tested: the best one of the recipe's own monitor, which must be ``choice``, or the
            last one; "nothing" for a table of what training costs.
        precision: of all runs; None is what the device computes fast, and "recipe" the recipe's own.
        methods: to compare, unless others are named.
        trial_steps: optimizer steps of a run that chooses, at most; None runs all of them.
        published: rows for comparison.
        notes: how the table differs from the paper's.
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
    """Read a table from its file, where ``task`` has what all tasks share; their lists are added to those there."""
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
"""By their names on the command line."""
