"""One run of a table: a recipe's commands, each in its own process, and the resulting row."""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.configs import RECIPES
from recipes.reproduce.methods import METHODS, Config
from recipes.reproduce.table import TABLES, Table
from recipes.studies.process import commit, fit, tested, written
from recipes.studies.result import OF_THE_CHOICE
from recipes.studies.rows import Row

Part = Literal["validation", "test"]
_VALIDATIONS = 4  # in a shortened run


@dataclass(frozen=True)
class Run:
    """A training with one configuration of a method and, with the part "test", a test of the weights that it keeps.

    Attributes:
        task: name of the task, which gives model and data.
        method: name of the method.
        config: configuration of the method.
        seed: seed of all that is random.
        part: part to be judged on: "validation" to choose a configuration, "test" for the chosen one.
        table: table that the run is for.
        start: run whose adapter this one starts from.
    """

    task: str
    method: str
    config: Config
    seed: int
    part: Part
    table: Table
    start: "Run | None" = None

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.config.items())
        return f"{self.task}, {self.method}, {chosen}, seed {self.seed}, {self.part}"

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of a run that chooses, if fewer than those of a whole run."""
        limit = self.table.trial_steps
        is_short = self.part == "validation" and limit is not None and limit < self.table.tasks[self.task].steps
        return limit if is_short else None

    @property
    def steps(self) -> int:
        """Optimizer steps, estimated if the recipe counts epochs."""
        return self.max_steps or self.table.tasks[self.task].steps

    @property
    def name(self) -> str:
        """A path that no other run of the table has."""
        settings = "-".join(f"{name}={value:g}" for name, value in self.config.items())
        start = "" if self.start is None else f"-from-{hashlib.sha256(self.start.name.encode()).hexdigest()[:8]}"
        part = self.part if self.max_steps is None else f"{self.part}-{self.max_steps}"
        return f"{self.task}/{part}/{self.method}-{settings}{start}/seed-{self.seed}"

    def key(self) -> Row:
        """Return what :func:`restored` turns into the run."""
        start = None if self.start is None else self.start.key()
        own = {"task": self.task, "method": self.method, "config": self.config, "seed": self.seed, "part": self.part}
        return {**own, "table": self.table.name, "start": start}


def restored(key: Row) -> Run:
    """Return the run with a key."""
    start = None if key["start"] is None else restored(key["start"])
    return Run(**{**key, "table": TABLES[key["table"]], "start": start})


@dataclass(frozen=True)
class Context:
    """Where runs are stored, and what all of them share.

    Attributes:
        folder: folder of the table.
        precision: precision of all computation.
        options: further arguments for every run.
    """

    folder: Path
    precision: str
    options: Sequence[str] = ()


def perform(run: Run, context: Context) -> Row:
    """Train, test what is to be tested, and remove the checkpoints.

    A run that was stopped resumes from its last checkpoint.

    Returns:
        With the part "validation" the ``score`` that decides the choice, where more is better, and the ``loss`` if the
        recipe logs one; ``metrics``, all that was logged by the end of the kept checkpoint's validation or in the test;
        and what :class:`recipes.studies.result.RunResult` writes.

    Raises:
        FailedError: a command failed.
        StoppedError: the user stopped it.
    """
    folder = context.folder / run.name
    recipe = run.table.recipe
    fitted = fit(recipe, folder, fit_arguments(run, context))
    found: Row = {"metrics": {}}
    if run.table.keeps != "nothing":
        kept = checkpoint(run, context.folder)
        if run.part == "test":
            found = {"metrics": tested(recipe, folder, _arguments(run, context), kept)}
        else:
            metrics = validated(fitted["validations"], run.table)
            found = {"score": score(metrics, run.table), "loss": metrics.get("val_loss"), "metrics": metrics}
        found["adapter"] = str(kept.with_suffix("").relative_to(context.folder))
        # With their optimizers, the checkpoints of all runs of a table would fill a disk.
        clear(kept, keep_adapter=run.part == "test" or _is_start(run))
    entries = {name: value for name, value in fitted.items() if name not in OF_THE_CHOICE}
    # Optuna's own pictures compare the runs by this. A trial with a value of nan would not count as done.
    value = found["score"] if "score" in found else next(iter(found["metrics"].values()), fitted["seconds_per_step"])
    value = -math.inf if math.isnan(value) else value
    return {"value": value, **found, "options": list(context.options), "commit": commit(), **entries}


def validated(validations: Sequence[Row], table: Table) -> Row:
    """Return the validation of the checkpoint that a run keeps: the first of the best ones, or the last one."""
    if not validations:
        raise MisconfigurationException("a run that chooses ended without a validation: let it validate more often")
    if table.keeps == "last":
        return validations[-1]
    # The first of equals, which the checkpoint callback has kept.
    return max(validations, key=lambda metrics: score(metrics, table))


def score(metrics: Row, table: Table) -> float:
    """Return the value that judges a validation; more is better, and nan is the worst."""
    value = float(metrics[f"val_{table.choice}"])
    if math.isnan(value):
        return -math.inf
    return -value if table.choice == "loss" else value


def fit_arguments(run: Run, context: Context) -> list[str]:
    """Return the arguments of the recipe's ``fit``."""
    more = []
    if run.start is not None:
        more.append(f"--model.start_from={checkpoint(run.start, context.folder).with_suffix('')}")
    if run.max_steps is not None:
        more.append(f"--trainer.max_steps={run.max_steps}")
        # An epoch may be longer than such a run.
        interval = max(1, run.max_steps // _VALIDATIONS)
        more += [f"--trainer.val_check_interval={interval}", "--trainer.check_val_every_n_epoch=null"]
    return _arguments(run, context, more)


def _arguments(run: Run, context: Context, more: Sequence[str] = ()) -> list[str]:
    table, task, method = run.table, run.table.tasks[run.task], METHODS[run.method]
    configs = RECIPES / table.recipe / "configs"
    return [
        *(f"--config={configs / path}" for path in ("base.yaml", *task.configs)),
        *task.options,
        *(f"--{option}={run.seed}" for option in table.seed_options),
        *method.options(run.config),
        "--trainer.enable_model_summary=false",
        # The protocols' batch sizes are for one device; several devices can each take a share of the plan.
        "--trainer.devices=1",
        *([f"--trainer.precision={context.precision}"] if table.precision is None else []),
        *more,
        *context.options,  # after the method's, so that --trainer.callbacks.… means its callback
    ]


def checkpoint(run: Run, folder: Path) -> Path:
    """Return the checkpoint that a finished training keeps; perhaps only the adapter's folder is left of it.

    Args:
        run: finished run.
        folder: folder of the table, which may have been moved since.
    """
    own = folder / run.name
    return own / "fit" / "checkpoints" / Path(written(own / "fit.json")[run.table.keeps]).name


def clear(kept: Path, keep_adapter: bool) -> None:
    """Remove a finished run's checkpoints, which hold the optimizer too, and adapters that nobody needs.

    Args:
        kept: tested checkpoint.
        keep_adapter: keep the adapter of this checkpoint.
    """
    for path in kept.parent.iterdir():
        if path.suffix == ".ckpt":
            path.unlink()
        elif path.is_dir() and (path != kept.with_suffix("") or not keep_adapter):
            shutil.rmtree(path)


def _is_start(run: Run) -> bool:
    return any(task.start == run.task for task in run.table.tasks.values())
