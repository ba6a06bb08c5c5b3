"""The runs of a table: all of them, those that may start, and what is chosen; several workers may share them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.reproduce.methods import METHODS, Config, same_run
from recipes.reproduce.run import Context, Part, Run, perform
from recipes.reproduce.table import Protocol, Table
from recipes.studies.process import FailedError
from recipes.studies.queue import Queue
from recipes.studies.rows import Row


@dataclass
class Plan:
    """All runs of a table for some methods, tasks and seeds.

    Each method's configurations are tried on the validation part, and the best one runs with each seed and is tested. A
    task's final runs wait for the choices of all its methods.

    Attributes:
        table: table to fill.
        methods: names of the methods.
        tasks: names of the tasks; those that they start from are added.
        seeds: seeds of the final runs.
        protocol: "tuned", or "paper" with the learning rates of the tasks instead of a choice.
        queue: the queue, with the results so far.
        failed: runs that ended with an error in this worker.
    """

    table: Table
    methods: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int]
    protocol: Protocol
    queue: Queue[Run]
    failed: list[Run] = field(default_factory=list, init=False)
    _choices: dict[tuple[str, str], Config] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.tasks = self.table.with_starts(self.tasks)

    def configurations(self, task: str, method: str) -> list[Config]:
        """Return the configurations to try for a method on a task; a single one needs no trial."""
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
            start = self.run(start_task, method, self._choices[start_task, method], seed, part)
        name, own = same_run(method, config, self.table.grids)
        return Run(task, name, own, seed, part, self.table, start)

    def trials(self, task: str, method: str) -> list[Run] | None:
        """Return the run of each configuration, none for a single one; None while they wait for another choice."""
        start = self.table.tasks[task].start
        if start is not None and None in [self.chosen(start, each) for each in self.methods]:
            return None
        configs = self.configurations(task, method)
        if len(configs) == 1:
            return []
        return [self.run(task, method, config, self.table.tuning_seed, "validation") for config in configs]

    def chosen(self, task: str, method: str) -> Config | None:
        """Return the configuration chosen on the validation part, of equal ones the first; None while unknown."""
        if (task, method) in self._choices:  # asked often, and finished rows do not change
            return self._choices[task, method]
        trials = self.trials(task, method)
        if trials is None:
            return None
        rows = [self.queue.find(run) for run in trials]
        if None in rows:
            return None
        judged = [judgement(row) for row in rows if row is not None]
        best = judged.index(max(judged)) if judged else 0
        self._choices[task, method] = self.configurations(task, method)[best]
        return self._choices[task, method]

    def finals(self, task: str, method: str) -> list[Run]:
        """Return the runs to be tested; none while they wait for choices."""
        if None in [self.chosen(task, each) for each in self.methods]:
            return []
        return [self.run(task, method, self._choices[task, method], seed, "test") for seed in self.seeds]

    def runs(self) -> list[Run]:
        """Return the runs that do not wait for a choice, done or not, in a fixed order.

        Those of size 0 are needed by several methods, and come several times.
        """
        runs: list[Run] = []
        for task in self.tasks:
            for method in self.methods:
                runs += self.trials(task, method) or []
            for method in self.methods:
                runs += self.finals(task, method)
        return runs

    def open_runs(self) -> list[Run]:
        """Return the runs that are not done, have not failed and may start now, each once."""
        failed = {run.name for run in self.failed}
        runs: dict[str, Run] = {}
        for run in self.runs():
            # The run that it starts from comes first; it has not run yet if its task has a single configuration.
            missing = [each for each in (run.start, run) if each is not None and self.queue.find(each) is None]
            if missing and missing[0].name not in failed:
                runs[missing[0].name] = missing[0]
        return list(runs.values())

    def attempt(self, run: Run, context: Context) -> Row:
        """Do a run; if it fails, it is left out and the others run, since it may just need too much memory."""
        try:
            return perform(run, context)
        except FailedError:
            self.failed.append(run)
            raise


def judgement(row: Row) -> tuple[float, float]:
    """Return the values that judge a trial, where more is better; a loss of nan is the worst there is.

    Equal scores are common on small validation sets; the loss, if the recipe logs one, still differs.

    Example:
        >>> judgement({"score": 0.5, "loss": 2.0}), judgement({"score": 0.5, "loss": math.nan})
        ((0.5, -2.0), (0.5, -inf))
    """
    loss = row["loss"] or 0.0
    return row["score"], -math.inf if math.isnan(loss) else -loss
