"""The runs of the comparison: what each method tries, and from which other one it takes its learning rate."""

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from recipes.comparison.methods import ALL
from recipes.comparison.run import Run
from recipes.comparison.task import Task
from recipes.shared.ledger import Row, each_once
from recipes.studies.choice import Judgement
from recipes.studies.plan import KEY, Config, Part, Results
from recipes.studies.plan import Plan as StudyPlan

RESULTS = "results.jsonl"
TUNING_SEEDS = (100, 101)  # none of the seeds of the test


class Plan(StudyPlan[Run]):
    """All runs of some tasks, methods and seeds.

    Args:
        folder: of ``results.jsonl``.
        tasks: to run.
        methods: names of the methods.
        seeds: of the runs that are judged on the test part.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int]) -> None:
        self._by_name = {task.name: task for task in tasks}
        results = Results(folder, [*KEY, "settings"])
        super().__init__(list(self._by_name), methods, TUNING_SEEDS, seeds, results)
        starts = [ALL[method].start for method in methods]
        self.tried = each_once([*(start for start in starts if start is not None), *methods])

    @override
    def configurations(self, task: str, method: str) -> list[Config]:
        rate = None
        for start in self.waits_for(task, method):
            chosen = self.chosen(*start)
            rate = chosen["learning_rate"] if chosen else None
        return ALL[method].configurations(self._by_name[task].grids, rate)

    @override
    def run(self, task: str, method: str, config: Config, seed: int, part: Part) -> Run:
        return Run(task, method, config, seed, part, self._by_name[task])

    @override
    def judgement(self, row: Row) -> Judgement:
        return row["accuracy"], -row["loss"]

    @override
    def waits_for(self, task: str, method: str) -> list[tuple[str, str]]:
        start = ALL[method].start
        return [] if start is None else [(task, start)]

    @property
    def done_and_total(self) -> tuple[int, int]:
        """Numbers of runs."""
        places = self.places()
        return sum(run is not None and self.results.find(run) is not None for run in places), len(places)
