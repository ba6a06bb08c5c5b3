"""Which runs there are, which are done, and which may start now; several processes may work in one folder."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from recipes.comparison.methods import ALL
from recipes.comparison.run import Run
from recipes.comparison.task import Config, Task
from recipes.shared.ledger import Ledger, Row, entries

RESULTS = "results.jsonl"
TUNING_SEEDS = (100, 101)  # none of the seeds of the test
_WAIT = 2.0  # seconds, while other processes do all that can be done now


class Plan:
    """All runs of some tasks, methods and seeds, and a folder that knows which of them are done.

    Each method has its configurations tried on the validation part with :data:`TUNING_SEEDS`, then the best one run
    with each seed and judged on the test part. Those that start from another method wait for its learning rate.

    Args:
        folder: of ``results.jsonl``.
        tasks: to run.
        methods: names of the methods.
        seeds: of the runs that are judged on the test part.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int]) -> None:
        self.folder = folder
        self.tasks = tasks
        self.methods = methods
        self.seeds = seeds
        self.ledger = Ledger(folder / RESULTS, entries("task", "method", "config", "seed", "part", "settings"))

    def work(self, perform: Callable[[Run], Row], report: Callable[[Run | None], None]) -> None:
        """Do what is not done and not being done by another process, until nothing is left.

        Args:
            perform: does a run.
            report: is called with each run before it starts, and with None after it or while others work.
        """
        runs = self.open_runs()
        while runs:
            if not self.ledger.perform_first(runs, perform, report):
                time.sleep(_WAIT)  # other processes are at all of them
            self.ledger.reload()
            report(None)
            runs = self.open_runs()

    def open_runs(self) -> list[Run]:
        """The runs that are not done and wait for no other, in the order in which they should be done."""
        runs: list[Run] = []
        for task in self.tasks:
            for name in self.methods:
                # Several methods wait for the runs of the one that they start from.
                runs += [run for run in self._next(task, name) if run not in runs]
        return runs

    @property
    def done_and_total(self) -> tuple[int, int]:
        """Numbers of runs."""
        tuned = set(self.methods)
        for name in self.methods:
            start = ALL[name].start
            if start is not None:
                tuned.add(start)
        total = len(self.tasks) * len(self.methods) * len(self.seeds)
        for task in self.tasks:
            for name in tuned:
                total += len(TUNING_SEEDS) * len(ALL[name].configurations(task.grids, None))
        settings = {task.name: task.settings for task in self.tasks}
        wanted = {"validation": (tuned, TUNING_SEEDS), "test": (set(self.methods), self.seeds)}
        done = 0
        for row in self.ledger.rows:
            methods, seeds = wanted[row["part"]]
            is_of_task = row["settings"] == settings.get(row["task"])
            if is_of_task and row["method"] in methods and row["seed"] in seeds:
                done += 1
        return done, total

    def _next(self, task: Task, name: str) -> list[Run]:
        """Of one task and method, what is not done of the first stage that has something left."""
        method, rate = ALL[name], None
        if method.start is not None:
            configs = ALL[method.start].configurations(task.grids, None)
            left = self._missing(task, method.start, configs, TUNING_SEEDS, "validation")
            if left:
                return left
            rate = self._chosen(task, method.start, configs)["learning_rate"]
        configs = method.configurations(task.grids, rate)
        left = self._missing(task, name, configs, TUNING_SEEDS, "validation")
        if left:
            return left
        return self._missing(task, name, [self._chosen(task, name, configs)], self.seeds, "test")

    def _missing(self, task: Task, name: str, configs: Sequence[Config], seeds: Sequence[int], part: str) -> list[Run]:
        runs = _runs(task, name, configs, seeds, part)
        return [run for run in runs if self.ledger.find(run) is None]

    def _chosen(self, task: Task, name: str, configs: Sequence[Config]) -> Config:
        rows = [self.ledger.find(run) for run in _runs(task, name, configs, TUNING_SEEDS, "validation")]
        return choose([row for row in rows if row is not None])


def _runs(task: Task, name: str, configs: Sequence[Config], seeds: Sequence[int], part: str) -> list[Run]:
    runs = []
    for config in configs:
        for seed in seeds:  # innermost, so that an early look at the table shows whole configurations
            runs.append(Run(task, name, config, seed, part))
    return runs


def choose(rows: Iterable[Row]) -> Config:
    """The configuration with the best mean accuracy, and among equals the least mean loss.

    Example:
        >>> choose([{"config": {"rho": r}, "accuracy": a, "loss": 1.0} for r, a in ((1, 0.5), (2, 0.7), (2, 0.7))])
        {'rho': 2}
    """
    by_config = defaultdict(list)
    for row in rows:
        by_config[json.dumps(row["config"])].append(row)

    def score(config: str) -> tuple[float, float]:
        of_config = by_config[config]
        return mean(row["accuracy"] for row in of_config), -mean(row["loss"] for row in of_config)

    chosen: Config = json.loads(max(by_config, key=score))
    return chosen
