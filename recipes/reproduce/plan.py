"""The runs of a table: what each method tries, and what a task starts from."""

from collections.abc import Sequence

from typing_extensions import override

from recipes.reproduce.methods import METHODS, same_run
from recipes.reproduce.run import Run
from recipes.reproduce.table import Protocol, Table
from recipes.shared.ledger import Row
from recipes.studies.choice import Judgement
from recipes.studies.plan import Config, Part, Results
from recipes.studies.plan import Plan as StudyPlan


class Plan(StudyPlan[Run]):
    """All runs of a table for some methods, tasks and seeds.

    Args:
        table: to fill.
        methods: names of the methods.
        tasks: names of the tasks; those that they start from are added.
        seeds: of the final runs.
        protocol: "tuned", or "paper" with the learning rates of the tasks instead of a choice.
        results: what is done.
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
        super().__init__(table.with_starts(tasks), methods, table.tuning_seeds, seeds, results)
        self.table = table
        self.protocol = protocol

    @override
    def configurations(self, task: str, method: str) -> list[Config]:
        if self.protocol == "tuned":
            return METHODS[method].configurations(self.table.learning_rates, self.table.grids)
        grids = dict(self.table.grids)
        # LoRA is not tuned in the paper's protocol: the first dropout is the recipe's.
        grids["lora_dropout"] = grids["lora_dropout"][:1]
        rho = self.table.tasks[task].rho
        if rho is not None:
            grids["rho"] = [rho]
        return METHODS[method].configurations([self.table.tasks[task].learning_rate], grids)

    @override
    def run(self, task: str, method: str, config: Config, seed: int, part: Part) -> Run:
        start_task, start = self.table.tasks[task].start, None
        if start_task is not None:
            start_config = self.chosen(start_task, method)
            assert start_config is not None  # waits_for
            start = self.run(start_task, method, start_config, seed, part)
        name, own = same_run(method, config, self.table.grids)
        return Run(task, name, own, seed, part, self.table, start)

    @override
    def judgement(self, row: Row) -> Judgement:
        # Equal scores are common on small validation sets, and the loss still differs, where the recipe logs one.
        return row["score"], -(row["loss"] or 0.0)

    @override
    def waits_for(self, task: str, method: str) -> list[tuple[str, str]]:
        start = self.table.tasks[task].start
        return [] if start is None else [(start, each) for each in self.methods]

    @override
    def first_to_do(self, run: Run) -> Run:
        # The run that it starts from may be another share's, which has not begun. A claim keeps two processes from
        # doing it at once.
        while run.start is not None and self.results.find(run.start) is None:
            run = run.start
        return run
