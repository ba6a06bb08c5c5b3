"""The runs of a table: which there are, which may start now, and what is chosen; several processes may share them."""

from collections.abc import Callable, Sequence

from recipes.reproduce.methods import METHODS, Config, same_run
from recipes.reproduce.run import Part, Run
from recipes.reproduce.table import Protocol, Table
from recipes.shared.ledger import Row, StoppedError
from recipes.studies.choice import Judgement, best
from recipes.studies.results import Results

MOST_FAILURES_IN_A_ROW = 3


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
        results: what is done, and the share of this process.

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
    ) -> None:
        self.table = table
        self.methods = methods
        self.tasks = table.with_starts(tasks)
        self.seeds = seeds
        self.protocol = protocol
        self.results = results
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

    def run(self, task: str, method: str, config: Config, seed: int, part: Part) -> Run:
        """A run; the choices of :meth:`waits_for` are known by then."""
        start_task, start = self.table.tasks[task].start, None
        if start_task is not None:
            start_config = self.chosen(start_task, method)
            assert start_config is not None  # waits_for
            start = self.run(start_task, method, start_config, seed, part)
        name, own = same_run(method, config, self.table.grids)
        return Run(task, name, own, seed, part, self.table, start)

    def waits_for(self, task: str) -> list[tuple[str, str]]:
        """The tasks and methods whose choices must be known before any run on a task."""
        start = self.table.tasks[task].start
        return [] if start is None else [(start, each) for each in self.methods]

    def trials(self, task: str, method: str) -> list[list[Run]] | None:
        """The runs of each configuration, empty where there is but one; None while they wait for another choice."""
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return [[]]
        if not self._may_start(task):
            return None
        tried = []
        for config in configs:
            tried.append([self.run(task, method, config, seed, "validation") for seed in self.table.tuning_seeds])
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

    def finals(self, task: str, method: str) -> list[Run] | None:
        """The runs that are tested; None while they wait for choices."""
        if not self._may_start(task) or any(self.chosen(task, each) is None for each in self.methods):
            return None
        config = self.chosen(task, method)
        assert config is not None
        return [self.run(task, method, config, seed, "test") for seed in self.seeds]

    def places(self) -> list[Run | None]:
        """A place for every run, in a fixed order; None for one that waits for a choice.

        Runs that several methods need, those of size 0, have several places.
        """
        places: list[Run | None] = []
        for task in self.tasks:
            for method in self.methods:
                places += self._trial_places(task, method)
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
            if self.results.shard.has(place) and self.results.find(run) is None:
                first = self.first_to_do(run)
                runs[first.name] = first
        return list(runs.values())

    def first_to_do(self, run: Run) -> Run:
        """The run itself, or the one that it starts from if that is not done."""
        # That may be another share's, which has not begun. A claim keeps two processes from doing it at once.
        while run.start is not None and self.results.find(run.start) is None:
            run = run.start
        return run

    @property
    def waiting(self) -> int:
        """How many of this share's runs wait for choices."""
        return sum(run is None and self.results.shard.has(place) for place, run in enumerate(self.places()))

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

    def _may_start(self, task: str) -> bool:
        return all(self.chosen(*other) is not None for other in self.waits_for(task))

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
            judged.append([_judgement(row) for row in done])
        return configs[best(judged)]

    def _trial_places(self, task: str, method: str) -> list[Run | None]:
        trials = self.trials(task, method)
        if trials is None:
            return [None] * (len(self.configurations(task, method)) * len(self.table.tuning_seeds))
        places: list[Run | None] = []
        for runs in trials:
            places += runs
        return places


def _judgement(row: Row) -> Judgement:
    # Equal scores are common on small validation sets, and the loss still differs, where the recipe logs one.
    return row["score"], -(row["loss"] or 0.0)
