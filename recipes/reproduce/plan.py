"""The runs of a table: which there are, which may start now, and what is chosen; several workers may share them."""

from collections.abc import Sequence

from recipes.reproduce.methods import METHODS, Config, same_run
from recipes.reproduce.run import Context, Part, Run, perform
from recipes.reproduce.table import Protocol, Table
from recipes.studies.choice import Judgement, best
from recipes.studies.process import FailedError
from recipes.studies.queue import Queue
from recipes.studies.rows import Row


class Plan:
    """All runs of a table for some methods, tasks and seeds.

    Each method has its configurations tried on the validation part, and the best one run with each seed and tested. A
    task's final runs wait for the choices of all its methods.

    Args:
        table: to fill.
        methods: names of the methods.
        tasks: names of the tasks; those that they start from are added.
        seeds: of the final runs.
        protocol: "tuned", or "paper" with the learning rates of the tasks instead of a choice.
        queue: what is done.

    Attributes:
        failed: the runs that ended with an error in this worker.
    """

    def __init__(
        self,
        table: Table,
        methods: Sequence[str],
        tasks: Sequence[str],
        seeds: Sequence[int],
        protocol: Protocol,
        queue: Queue[Run],
    ) -> None:
        self.table = table
        self.methods = methods
        self.tasks = table.with_starts(tasks)
        self.seeds = seeds
        self.protocol = protocol
        self.queue = queue
        self.failed: list[Run] = []
        self._choices: dict[tuple[str, str], Config] = {}

    def configurations(self, task: str, method: str) -> list[Config]:
        """Return what is tried for a method on a task; a single one needs no trial."""
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
        """Return a run of a task that may start."""
        start_task, start = self.table.tasks[task].start, None
        if start_task is not None:
            start_config = self.chosen(start_task, method)
            assert start_config is not None  # the task may start
            start = self.run(start_task, method, start_config, seed, part)
        name, own = same_run(method, config, self.table.grids)
        return Run(task, name, own, seed, part, self.table, start)

    def trials(self, task: str, method: str) -> list[list[Run]] | None:
        """Return the runs of each configuration, none for a single one; None while they wait for another choice."""
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
        """Return the configuration that the validation part has chosen; None while unknown."""
        if (task, method) not in self._choices:
            # Kept once it is known: each look at the plan asks for every choice, and finished rows do not change.
            choice = self._choose(task, method)
            if choice is None:
                return None
            self._choices[task, method] = choice
        return self._choices[task, method]

    def finals(self, task: str, method: str) -> list[Run] | None:
        """Return the runs that are tested; None while they wait for choices."""
        if not self._may_start(task) or any(self.chosen(task, each) is None for each in self.methods):
            return None
        config = self.chosen(task, method)
        assert config is not None
        return [self.run(task, method, config, seed, "test") for seed in self.seeds]

    def runs(self) -> list[Run]:
        """Return the runs that do not wait for a choice, done or not, in a fixed order.

        Some are needed by several methods, those of size 0, and are there several times.
        """
        runs: list[Run] = []
        for task in self.tasks:
            for method in self.methods:
                for of_config in self.trials(task, method) or []:
                    runs += of_config
            for method in self.methods:
                runs += self.finals(task, method) or []
        return runs

    def open_runs(self) -> list[Run]:
        """Return the runs that are not done, have not failed and may start now, each once."""
        failed = {run.name for run in self.failed}
        runs: dict[str, Run] = {}
        for run in self.runs():
            if self.queue.find(run) is None:
                first = self.first_to_do(run)
                if first.name not in failed:
                    runs[first.name] = first
        return list(runs.values())

    def first_to_do(self, run: Run) -> Run:
        """Return the run itself, or the one that it starts from if that is not done."""
        while run.start is not None and self.queue.find(run.start) is None:
            run = run.start
        return run

    def attempt(self, run: Run, context: Context) -> Row:
        """Do a run; one that fails is left out and the others are done, since it may need too much memory."""
        try:
            return perform(run, context)
        except FailedError:
            self.failed.append(run)
            raise

    def _may_start(self, task: str) -> bool:
        """Say whether the choices of the task that this one starts from are known, if there is one."""
        start = self.table.tasks[task].start
        return start is None or all(self.chosen(start, method) is not None for method in self.methods)

    def _choose(self, task: str, method: str) -> Config | None:
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return configs[0]
        trials = self.trials(task, method)
        if trials is None:
            return None
        judged = []
        for runs in trials:
            rows = [self.queue.find(run) for run in runs]
            done = [row for row in rows if row is not None]
            if len(done) < len(rows):
                return None
            judged.append([_judgement(row) for row in done])
        return configs[best(judged)]


def _judgement(row: Row) -> Judgement:
    # Equal scores are common on small validation sets, and the loss still differs, where the recipe logs one.
    return row["score"], -(row["loss"] or 0.0)
