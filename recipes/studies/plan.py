"""Which runs a study needs, which may start now, and what is chosen; several processes may share the runs."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Generic, Literal, TypeVar

from recipes.shared.ledger import Ledger, Row, StoppedError, entries
from recipes.shared.ledger import Run as AnyKeyed
from recipes.studies.choice import Judgement, best

Config = dict[str, float]
Part = Literal["validation", "test"]
KEY = ("task", "method", "config", "seed", "part")
MOST_FAILURES_IN_A_ROW = 3
_RESULTS = "results"


@dataclass(frozen=True)
class Run:
    """A training with one configuration of a method.

    Attributes:
        task: model and data, by their name.
        method: its name.
        config: its configuration.
        seed: of all that is random.
        part: to be judged on, "validation" to choose a configuration by, "test" with the chosen one.
    """

    task: str
    method: str
    config: Config
    seed: int
    part: Part

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.config.items())
        return f"{self.task}, {self.method}, {chosen}, seed {self.seed}, {self.part}"

    @property
    def name(self) -> str:
        """A path that no other run of the study has."""
        settings = "-".join(f"{name}={value:g}" for name, value in self.config.items())
        return f"{self.task}/{self.part}/{self.method}-{settings}/seed-{self.seed}"

    def key(self) -> Row:
        """The first entries of its row, which make it this run."""
        return {name: getattr(self, name) for name in KEY}


AnyRun = TypeVar("AnyRun", bound=Run)


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


def shard(text: str) -> Shard:
    """The share that a text such as "2/8" names.

    Raises:
        argparse.ArgumentTypeError: it names none.

    Example:
        >>> shard("2/8")
        Shard(number=2, count=8)
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a share such as 2/8, from 1/8 to 8/8")
    return Shard(int(number), int(count))


class Results:
    """The rows of all shares: each writes into a file of its own, since not every file system appends safely.

    Args:
        folder: of the study.
        key: the entries of a row that make up its run's key.
        shard: whose rows are appended.
    """

    def __init__(self, folder: Path, key: Sequence[str], shard: Shard = Shard()) -> None:
        self.folder = folder
        self.shard = shard
        self._key = entries(*key)
        suffix = "" if shard.count == 1 else f"-{shard.number}-of-{shard.count}"
        self.own = Ledger(folder / f"{_RESULTS}{suffix}.jsonl", self._key)
        self._others: list[Ledger] = []
        self.reload()

    def reload(self) -> None:
        """Read all files again."""
        self.own.reload()
        paths = [self.folder / f"{_RESULTS}.jsonl", *sorted(self.folder.glob(f"{_RESULTS}-*-of-*.jsonl"))]
        self._others = [Ledger(path, self._key) for path in paths if path != self.own.path]

    @property
    def rows(self) -> list[Row]:
        """The rows of all files."""
        return list(chain.from_iterable(ledger.rows for ledger in (self.own, *self._others)))

    def find(self, run: AnyKeyed) -> Row | None:
        """The row of a run, or None while the run is not done."""
        for ledger in (self.own, *self._others):
            row = ledger.find(run)
            if row is not None:
                return row
        return None


class Plan(ABC, Generic[AnyRun]):
    """All runs of a study for some methods, tasks and seeds.

    Each method has its configurations tried on the validation part, and the best one run with each seed and tested. A
    task's final runs wait for the choices of all its methods, so that every share knows the same runs.

    Args:
        tasks: their names.
        methods: their names.
        tuning_seeds: of the runs that choose.
        seeds: of the final runs.
        results: what is done, and the share of this process.

    Attributes:
        failed: the runs that ended with an error in this process.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        methods: Sequence[str],
        tuning_seeds: Sequence[int],
        seeds: Sequence[int],
        results: Results,
    ) -> None:
        self.tasks = tasks
        self.methods = methods
        self.tuning_seeds = tuning_seeds
        self.seeds = seeds
        self.results = results
        self.failed: list[AnyRun] = []
        self._choices: dict[tuple[str, str], Config] = {}

    @abstractmethod
    def configurations(self, task: str, method: str) -> list[Config]:
        """What is tried for a method on a task; a single one needs no trial.

        Their number is asked for before the choices of :meth:`waits_for` are known.
        """

    @abstractmethod
    def run(self, task: str, method: str, config: Config, seed: int, part: Part) -> AnyRun:
        """A run; the choices of :meth:`waits_for` are known by then."""

    @abstractmethod
    def judgement(self, row: Row) -> Judgement:
        """What a row with the part "validation" is judged by."""

    def waits_for(self, task: str, method: str) -> list[tuple[str, str]]:
        """The tasks and methods whose choices must be known before a method's runs on a task."""
        return []

    def trials(self, task: str, method: str) -> list[list[AnyRun]] | None:
        """The runs of each configuration, empty where there is but one; None while they wait for another choice."""
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return [[]]
        if not self._may_start(task, method):
            return None
        tried = []
        for config in configs:
            tried.append([self.run(task, method, config, seed, "validation") for seed in self.tuning_seeds])
        return tried

    def chosen(self, task: str, method: str) -> Config | None:
        """The configuration that the validation part has chosen; None while unknown."""
        if (task, method) not in self._choices:
            # Kept once it is known: each look at the plan asks for every choice, and finished rows do not change.
            choice = self._choose(task, method)
            if choice is None:
                return None
            self._choices[task, method] = choice
        return self._choices[task, method]

    def finals(self, task: str, method: str) -> list[AnyRun] | None:
        """The runs that are tested; None while they wait for choices."""
        if not self._may_start(task, method) or any(self.chosen(task, each) is None for each in self.methods):
            return None
        config = self.chosen(task, method)
        assert config is not None
        return [self.run(task, method, config, seed, "test") for seed in self.seeds]

    def places(self) -> list[AnyRun | None]:
        """A place for every run, in a fixed order; None for one that waits for a choice.

        Runs that several methods need, those of size 0, have several places.
        """
        places: list[AnyRun | None] = []
        for task in self.tasks:
            for method in self.methods:
                places += self._trial_places(task, method)
            for method in self.methods:
                places += self.finals(task, method) or [None] * len(self.seeds)
        return places

    def open_runs(self) -> list[AnyRun]:
        """This share's runs that are not done and may start now."""
        runs: dict[str, AnyRun] = {}
        seen: set[str] = set()
        for place, run in enumerate(self.places()):
            # A run belongs to the share of its first place.
            if run is None or run.name in seen:
                continue
            seen.add(run.name)
            if self.results.shard.has(place) and self.results.find(run) is None:
                first = self.first_to_do(run)
                runs[first.name] = first
        return list(runs.values())

    def first_to_do(self, run: AnyRun) -> AnyRun:
        """The run itself, or another one that it needs and that is not done."""
        return run

    @property
    def waiting(self) -> int:
        """How many of this share's runs wait for choices."""
        return sum(run is None and self.results.shard.has(place) for place, run in enumerate(self.places()))

    def work(self, perform: Callable[[AnyRun], Row], report: Callable[[AnyRun], None]) -> None:
        """Do this share's runs, until nothing is left or what is left waits for others.

        A run that fails is left out and the others are done, since it may be one that needs too much memory.

        Args:
            perform: does a run.
            report: is called with each run before it starts.

        Raises:
            StoppedError: the user has stopped a run, or several in a row have failed.
        """
        started: list[AnyRun] = []
        in_a_row = 0

        def start(run: AnyRun) -> None:
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

    def _may_start(self, task: str, method: str) -> bool:
        return all(self.chosen(*other) is not None for other in self.waits_for(task, method))

    def _choose(self, task: str, method: str) -> Config | None:
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return configs[0]
        trials = self.trials(task, method)
        if trials is None:
            return None
        judged = []
        for runs in trials:
            rows = [self.results.find(run) for run in runs]
            done = [row for row in rows if row is not None]
            if len(done) < len(rows):
                return None
            judged.append([self.judgement(row) for row in done])
        return configs[best(judged)]

    def _trial_places(self, task: str, method: str) -> list[AnyRun | None]:
        trials = self.trials(task, method)
        if trials is None:
            return [None] * (len(self.configurations(task, method)) * len(self.tuning_seeds))
        places: list[AnyRun | None] = []
        for runs in trials:
            places += runs
        return places
