"""Which runs a table needs, which may start now, and what is chosen; several processes may share the runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from recipes.reproduce.methods import METHODS, Config, same_run
from recipes.reproduce.run import KEY, Part, Run
from recipes.reproduce.table import Protocol, Table
from recipes.shared.ledger import Ledger, Row, StoppedError, entries

RESULTS = "results"
MOST_FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class Shard:
    """One share of the runs.

    Attributes:
        number: of the share, from 1 on.
        count: of the shares.
    """

    number: int = 1
    count: int = 1

    def has(self, place: int) -> bool:
        """Whether the run at a place of the plan is this share's."""
        return place % self.count == self.number - 1


class Results:
    """The rows of all shares: each writes into a file of its own, since not every file system appends safely.

    Args:
        folder: of the table.
        shard: whose rows are appended.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.folder = folder
        suffix = "" if shard.count == 1 else f"-{shard.number}-of-{shard.count}"
        self.own = Ledger(folder / f"{RESULTS}{suffix}.jsonl", entries(*KEY))
        self._others: list[Ledger] = []
        self.reload()

    def reload(self) -> None:
        """Read all files again."""
        self.own.reload()
        paths = [path for path in sorted(self.folder.glob(f"{RESULTS}*.jsonl")) if path != self.own.path]
        self._others = [Ledger(path, entries(*KEY)) for path in paths]

    def find(self, run: Run) -> Row | None:
        """The row of a run, or None while the run is not done."""
        for ledger in (self.own, *self._others):
            row = ledger.find(run)
            if row is not None:
                return row
        return None


class Plan:
    """All runs of a table for some methods, tasks and seeds.

    Each method has its configurations tried on the validation part, and the best one run with each seed and tested. A
    task's final runs wait for the choices of all its methods, so that every share knows the same runs.

    Args:
        table: to fill.
        methods: names of the methods.
        tasks: names of the tasks; those that they start from are added.
        seeds: of the final runs.
        protocol: "tuned", or "paper" with the learning rates of the tasks instead of a choice.
        results: what is done.
        shard: the share of this process.

    Attributes:
        failed: the runs that ended with an error in this process.
    """

    def __init__(
        self,
        table: Table,
        methods: Sequence[str],
        tasks: Sequence[str],
        seeds: Sequence[int],
        protocol: Protocol,
        results: Results,
        shard: Shard = Shard(),
    ) -> None:
        self.table = table
        self.methods = methods
        self.tasks = table.with_starts(tasks)
        self.seeds = seeds
        self.protocol = protocol
        self.results = results
        self.shard = shard
        self.failed: list[Run] = []
        self._choices: dict[tuple[str, str], Config] = {}

    def configurations(self, task: str, method: str) -> list[Config]:
        """What is tried for a method on a task; a single one needs no trial."""
        if self.protocol == "tuned":
            return METHODS[method].configurations(self.table.learning_rates, self.table.grids)
        grids = dict(self.table.grids)
        # LoRA is not tuned in the paper's protocol: the first dropout is the recipe's.
        grids["lora_dropout"] = grids["lora_dropout"][:1]
        rho = self.table.tasks[task].rho
        if rho is not None:
            grids["rho"] = [rho]
        return METHODS[method].configurations([self.table.tasks[task].learning_rate], grids)

    def trials(self, task: str, method: str) -> list[list[Run]] | None:
        """The runs of each configuration, empty where there is but one; None while they wait for another choice."""
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return [[]]
        if not self._knows_start(task):
            return None
        tried = []
        for config in configs:
            tried.append([self._run(task, method, config, seed, "validation") for seed in self.table.tuning_seeds])
        return tried

    def chosen(self, task: str, method: str) -> Config | None:
        """The configuration with the best validation score, and among equals the least loss; None while unknown."""
        if (task, method) not in self._choices:
            # Kept once it is known: each look at the plan asks for every choice, and finished rows do not change.
            choice = self._choose(task, method)
            if choice is None:
                return None
            self._choices[task, method] = choice
        return self._choices[task, method]

    def finals(self, task: str, method: str) -> list[Run] | None:
        """The runs that are tested; None while they wait for choices."""
        if not self._is_chosen(task) or not self._knows_start(task):
            return None
        config = self.chosen(task, method)
        assert config is not None
        return [self._run(task, method, config, seed, "test") for seed in self.seeds]

    def places(self) -> list[Run | None]:
        """A place for every run, in a fixed order; None for one that waits for a choice.

        Runs that several methods need, those of size 0, have several places.
        """
        places: list[Run | None] = []
        for task in self.tasks:
            for method in self.methods:
                places += self._trial_places(task, method)
        for task in self.tasks:
            for method in self.methods:
                places += self.finals(task, method) or [None] * len(self.seeds)
        return places

    def open_runs(self) -> list[Run]:
        """This share's runs that are not done and may start now."""
        runs: dict[str, Run] = {}
        seen: set[str] = set()
        for place, run in enumerate(self.places()):
            # A run belongs to the share of its first place.
            if run is None or run.name in seen:
                continue
            seen.add(run.name)
            if self.shard.has(place) and self.results.find(run) is None:
                # The run that it starts from may be another share's, which has not begun. A claim keeps two processes
                # from doing it at once.
                first = self._first_to_do(run)
                runs[first.name] = first
        return list(runs.values())

    @property
    def waiting(self) -> int:
        """How many of this share's runs wait for choices."""
        return sum(run is None and self.shard.has(place) for place, run in enumerate(self.places()))

    def work(self, perform: Callable[[Run], Row], report: Callable[[Run], None]) -> None:
        """Do this share's runs, until nothing is left or what is left waits for others.

        A run that fails is left out and the others are done, since it may be one that needs too much memory.

        Args:
            perform: does a run.
            report: is called with each run before it starts.

        Raises:
            StoppedError: the user has stopped a run, or several in a row have failed.
        """
        started: list[Run] = []
        in_a_row = 0

        def start(run: Run) -> None:
            started.append(run)
            report(run)

        while True:
            self.results.reload()
            failed = {run.name for run in self.failed}
            runs = [run for run in self.open_runs() if run.name not in failed]
            try:
                if not self.results.own.perform_first(runs, perform, start):
                    return
                in_a_row = 0
            except StoppedError as stop:
                if stop.is_by_user:
                    raise
                self.failed.append(started[-1])
                in_a_row += 1
                # When every run fails, something is wrong that all of them share, such as an option.
                if in_a_row == MOST_FAILURES_IN_A_ROW:
                    raise

    def _choose(self, task: str, method: str) -> Config | None:
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return configs[0]
        trials = self.trials(task, method)
        if trials is None:
            return None
        scores = []
        for runs in trials:
            rows = [self.results.find(run) for run in runs]
            done = [row for row in rows if row is not None]
            if len(done) < len(rows):
                return None
            # Equal scores are common on small validation sets, and the loss still differs.
            scores.append((mean(row["score"] for row in done), -mean(_loss(row) for row in done)))
        return configs[scores.index(max(scores))]

    def _trial_places(self, task: str, method: str) -> list[Run | None]:
        trials = self.trials(task, method)
        if trials is None:
            return [None] * (len(self.configurations(task, method)) * len(self.table.tuning_seeds))
        places: list[Run | None] = []
        for runs in trials:
            places += runs
        return places

    def _run(self, task: str, method: str, config: Config, seed: int, part: Part) -> Run:
        start_task, start = self.table.tasks[task].start, None
        if start_task is not None:
            start_config = self.chosen(start_task, method)
            assert start_config is not None  # _knows_start
            start = self._run(start_task, method, start_config, seed, part)
        name, own = same_run(method, config, self.table.grids)
        return Run(self.table, task, name, own, seed, part, start)

    def _knows_start(self, task: str) -> bool:
        start = self.table.tasks[task].start
        return start is None or self._is_chosen(start)

    def _is_chosen(self, task: str) -> bool:
        return all(self.chosen(task, method) is not None for method in self.methods)

    def _first_to_do(self, run: Run) -> Run:
        """The run, or the one that it starts from while that is not done."""
        while run.start is not None and self.results.find(run.start) is None:
            run = run.start
        return run


def _loss(row: Row) -> float:
    """A row's loss; none where the recipe logs none, and the worst where it is no number."""
    loss = row["loss"]
    if loss is None:
        return 0.0
    return math.inf if math.isnan(loss) else float(loss)
