"""The runs of a sweep: data sets x numbers of shots x methods x values to choose from x seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from recipes.shared.ledger import Row, each_once
from recipes.studies.choice import Judgement
from recipes.studies.plan import KEY, Config, Part, Plan, Results
from recipes.studies.plan import Run as StudyRun


@dataclass(frozen=True)
class Run(StudyRun):
    """A training, whose result holds the accuracies on both the validation and the test part.

    Attributes:
        dataset: None is the configuration's.
        shots: images of each class.
    """

    dataset: str | None
    shots: int

    @property
    @override
    def name(self) -> str:
        settings = [f"{name}={value:g}" for name, value in self.config.items()]
        data = "" if self.dataset is None else _folder_name(self.dataset) + "/"
        return f"{data}{self.shots}-shot/{'-'.join([self.method, *settings])}/seed-{self.seed}"


class Sweep(Plan[Run]):
    """All values are run with all seeds, and the choice between them is made afterwards.

    Args:
        datasets: names or folders; None is the configuration's.
        shots: numbers of images of each class.
        methods: their names.
        seeds: of all runs.
        grids: values of "learning_rate" and "rho"; without any, the configuration's is taken.
        folder: where everything lands.

    Raises:
        MisconfigurationException: two data sets would share a folder.
    """

    def __init__(
        self,
        datasets: Sequence[str | None],
        shots: Sequence[int],
        methods: Sequence[str],
        seeds: Sequence[int],
        grids: dict[str, Sequence[float]],
        folder: Path,
    ) -> None:
        self.datasets = each_once(datasets)
        _refuse_shared_folders([dataset for dataset in self.datasets if dataset is not None])
        self.shots = sorted(set(shots))
        self.grids = {name: each_once(values) for name, values in grids.items()}
        self._of_task = {task(*pair): pair for pair in product(self.datasets, self.shots)}
        seeds = each_once(seeds)
        super().__init__(list(self._of_task), each_once(methods), seeds, seeds, Results(folder, KEY))

    @override
    def configurations(self, task: str, method: str) -> list[Config]:
        grids = {name: values for name, values in self.grids.items() if values}
        if method == "lora":
            grids.pop("rho", None)
        return [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]

    @override
    def run(self, task: str, method: str, config: Config, seed: int, part: Part = "test") -> Run:
        # Every run is tested at its end, so that the one that is chosen need not be done again.
        return Run(task, method, config, seed, "test", *self._of_task[task])

    @override
    def judgement(self, row: Row) -> Judgement:
        return (accuracy(row, "validation"),)

    def rows(self, task: str, method: str, config: Config) -> list[Row]:
        """The results of those seeds that are done."""
        found = [self.results.find(self.run(task, method, config, seed)) for seed in self.seeds]
        return [row for row in found if row is not None]


def _folder_name(dataset: str) -> str:
    """What a data set's folder is called: it may be a folder itself, of whose path one name is made."""
    return dataset.strip("/").replace("/", "_")


def _refuse_shared_folders(datasets: Sequence[str]) -> None:
    """The second one's runs would not be performed: a run whose folder holds a result is taken for done."""
    names = [_folder_name(dataset) for dataset in datasets]
    alike = [dataset for dataset, name in zip(datasets, names, strict=True) if names.count(name) > 1]
    if alike:
        raise MisconfigurationException(
            f"the runs of the data sets {', '.join(alike)} would share folders, in whose names / becomes _: leave out "
            "what is named twice, or rename a folder"
        )


def task(dataset: str | None, shots: int) -> str:
    """What the runs on a data set with a number of shots are called.

    Example:
        >>> task("eurosat", 1), task(None, 4)
        ('eurosat, 1 shot', '4 shots')
    """
    counted = f"{shots} shot{'s' * (shots > 1)}"
    return counted if dataset is None else f"{dataset}, {counted}"


def accuracy(row: Row, part: Part) -> float:
    """Of a run's result, between 0 and 1.

    Raises:
        MisconfigurationException: the run was not judged on that part.
    """
    value: float = row[part].get("accuracy", math.nan)
    if math.isnan(value):
        raise MisconfigurationException(
            f"these runs have no accuracy on the {part} part, which --part shows and which chooses between values of "
            "--rho and --learning_rate: set --data.validation_shots above 0"
        )
    return value
