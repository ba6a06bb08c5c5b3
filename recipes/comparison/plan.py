"""Which runs there are, which are done, and which may start now; several processes may work in one folder."""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from filelock import FileLock, Timeout

from recipes.clip_demo.run import Row, append
from recipes.comparison.methods import ALL
from recipes.comparison.run import Run
from recipes.comparison.task import Config, Task, all_settings

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
        self._rows: dict[str, Row] = {}
        self.reload()

    def reload(self) -> None:
        """Look anew which runs are done."""
        self._rows = {_name(row): row for row in read(self.folder / RESULTS)}

    def work(self, perform: Callable[[Run], Row], tell: Callable[[Run | None], None]) -> None:
        """Do what is not done and not being done by another process, until nothing is left.

        Args:
            perform: does a run.
            tell: is called with each run before it starts, and with None after it or while others work.
        """
        while runs := self.open_runs():
            for run in runs:
                with self._claimed(run) as is_mine:
                    if is_mine:
                        tell(run)
                        append(self.folder / RESULTS, perform(run))
                        break
            else:
                time.sleep(_WAIT)
            self.reload()
            tell(None)

    def open_runs(self) -> list[Run]:
        """The runs that are not done and wait for no other, in the order in which they should be done."""
        found = {
            _name(run.key()): run for task in self.tasks for name in self.methods for run in self._next(task, name)
        }
        return list(found.values())

    @property
    def done_and_total(self) -> tuple[int, int]:
        """Numbers of runs."""
        tuned = {*self.methods, *(start for name in self.methods if (start := ALL[name].start))}
        configs = [ALL[name].configurations(task.grids, None) for task in self.tasks for name in tuned]
        total = len(TUNING_SEEDS) * sum(map(len, configs)) + len(self.tasks) * len(self.methods) * len(self.seeds)
        settings = {task.name: all_settings(task.settings) for task in self.tasks}
        wanted = {"validation": (tuned, TUNING_SEEDS), "test": (set(self.methods), self.seeds)}
        done = 0
        for row in self._rows.values():
            methods, seeds = wanted[row["part"]]
            is_of_task = all_settings(row["settings"]) == settings.get(row["task"])
            done += is_of_task and row["method"] in methods and row["seed"] in seeds
        return min(done, total), total  # a folder may hold more, of a grid that has changed since

    def _next(self, task: Task, name: str) -> list[Run]:
        """Of one task and method, what is not done of the first stage that has something left."""
        method, rate = ALL[name], None
        if method.start is not None:
            configs = ALL[method.start].configurations(task.grids, None)
            if left := self._missing(task, method.start, configs, TUNING_SEEDS, "validation"):
                return left
            rate = self._chosen(task, method.start, configs)["learning_rate"]
        configs = method.configurations(task.grids, rate)
        if left := self._missing(task, name, configs, TUNING_SEEDS, "validation"):
            return left
        return self._missing(task, name, [self._chosen(task, name, configs)], self.seeds, "test")

    def _missing(self, task: Task, name: str, configs: Sequence[Config], seeds: Sequence[int], part: str) -> list[Run]:
        # Seeds innermost, so that an early look at the table shows whole configurations.
        runs = [Run(task, name, config, seed, part) for config in configs for seed in seeds]
        return [run for run in runs if _name(run.key()) not in self._rows]

    def _chosen(self, task: Task, name: str, configs: Sequence[Config]) -> Config:
        runs = [Run(task, name, config, seed, "validation") for config in configs for seed in TUNING_SEEDS]
        return choose([self._rows[_name(run.key())] for run in runs])

    @contextmanager
    def _claimed(self, run: Run) -> Iterator[bool]:
        """Whether this process is the one that does a run; the lock goes with the process, however it ends."""
        claims = self.folder / "claims"
        claims.mkdir(exist_ok=True)
        lock = FileLock(claims / hashlib.sha256(_name(run.key()).encode()).hexdigest()[:16], blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            self.reload()
            yield _name(run.key()) not in self._rows  # another one may have done it since this one looked
        finally:
            lock.release()


def choose(rows: Iterable[Row]) -> Config:
    """The configuration with the best mean accuracy, and among equals the least mean loss.

    Example:
        >>> choose([{"config": {"rho": r}, "accuracy": a, "loss": 1.0} for r, a in ((1, 0.5), (2, 0.7), (2, 0.7))])
        {'rho': 2}
    """
    by_config = defaultdict(list)
    for row in rows:
        by_config[json.dumps(row["config"])].append(row)
    scored = {
        config: (mean(row["accuracy"] for row in own), -mean(row["loss"] for row in own))
        for config, own in by_config.items()
    }
    chosen: Config = json.loads(max(scored, key=lambda config: scored[config]))
    return chosen


def read(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; a line that a stop has cut off counts for nothing."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _name(row: Row) -> str:
    """What makes a run that one, as text."""
    parts = {part: row[part] for part in ("task", "method", "config", "seed", "part")}
    return json.dumps({**parts, "settings": all_settings(row["settings"])}, sort_keys=True)
