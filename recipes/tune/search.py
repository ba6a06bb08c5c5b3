"""The runs of a search, which of them come next, and one of them, in its own process."""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from recipes.studies.choice import best
from recipes.studies.ledger import Ledger, Row, commit
from recipes.studies.process import fit, module_of, tested
from recipes.tune.space import RHO, Config, Space, arguments, seeds_of, short, size, suggestion

WITHOUT, WITH, CONTROL = "without", "with", "control"
SIDES = (WITHOUT, WITH)
"""The two searches; the control is LoRA with the settings that the one with the perturbation has chosen."""
KEY = ("side", "config", "seed", "stage")
SEARCH_SEEDS = (0, 1, 2)
"""All trials are run with the first one, and the best third of them with the others."""
FIRST_FRESH_SEED = 100
_LEAST_REPEATED = 2  # trials of a side that are run with all seeds


class Run(NamedTuple):
    """A training.

    Attributes:
        side: "with" the perturbation, "without" it, or the "control".
        config: its settings; rho is 0 except with the perturbation.
        seed: of ``--seed_everything`` and, in a recipe, of the data where it does not draw their parts.
        stage: "search", or "final" for the winner of a side on seeds that have chosen nothing.
        trial: its configuration's number.
    """

    side: str
    config: Config
    seed: int
    stage: str
    trial: int

    def __str__(self) -> str:
        side = self.side if self.side == CONTROL else f"{self.side} the perturbation"
        return f"{side}: {short(self.config)}, seed {self.seed}"

    @property
    def name(self) -> str:
        """A path that no other run has, and that every system takes."""
        settings = re.sub(r"[^\w.=+-]+", "_", short(self.config))[:100]
        own = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.stage}/{settings}-{own}/seed-{self.seed}"

    def key(self) -> Row:
        """Return the entries of its row that make it this run."""
        return {name: getattr(self, name) for name in KEY}


@dataclass
class Search:
    """A search on each side, with as many trials, and the winners of both on fresh seeds, with a control.

    Attributes:
        command: the name of a recipe's folder, or a module that is a LightningCLI.
        options: of its ``fit``.
        space: the settings of both sides.
        radii: what the side with the perturbation may take as rho.
        results: what is done.
        trials: of both sides together.
        fresh: seeds of the winners.
        metric: on validation; None is the one by which the configuration keeps its best checkpoint.
        mode: "min" or "max" of the metric; None is the configuration's, for its own metric.
        tests: judge the winners on the test data, and not on the validation data.
    """

    command: str
    options: Sequence[str]
    space: Space
    radii: Sequence[str]
    results: Ledger
    trials: int = 20
    fresh: int = 5
    metric: str | None = None
    mode: str | None = None
    tests: bool = False

    # -- what there is to do

    def open_runs(self) -> list[Run]:
        """Return the runs that may start now; none if all are done.

        They are the next trial of each side, then all repeats, then all final runs.
        """
        runs = []
        for side in SIDES:
            tried = self.tried(side)
            missing = [number for number in range(self.trials_of(side)) if number not in tried]
            if missing:
                judgements = [(row["config"], -judged(row)) for row in tried.values()]
                config = suggestion(self.space_of(side), judgements, missing[0])
                runs.append(Run(side, config, SEARCH_SEEDS[0], "search", missing[0]))
        if runs:
            return sorted(runs, key=lambda run: run.trial)
        repeats = [run for run in self._repeats() if self.results.find(run) is None]
        return repeats or [run for run in self._finals() if self.results.find(run) is None]

    @property
    def is_finished(self) -> bool:
        """Whether all runs are done."""
        return not self.open_runs()

    def left(self) -> int:
        """Count the runs that are to be done; with those of a control, while it is not known whether there is one."""
        most = len(SIDES) + bool(self.space)
        runs = (len(self.finalists()) or most) * self.fresh
        for side in SIDES:
            trials = self.trials_of(side)
            runs += trials + _repeated(trials) * (len(SEARCH_SEEDS) - 1)
        return max(0, runs - len(self.results.rows))

    def trials_of(self, side: str) -> int:
        """Return the number of trials of a side: as many as the other has, or all settings that there are."""
        return min(self.trials // 2, size(self.space_of(side)))

    def tried(self, side: str) -> dict[int, Row]:
        """Return the finished trials of a side with the first seed, by their numbers."""
        found = {}
        for row in self.results.rows:
            if row["side"] == side and row["stage"] == "search" and row["seed"] == SEARCH_SEEDS[0]:
                found[row["trial"]] = row
        return dict(sorted(found.items()))

    def space_of(self, side: str) -> Space:
        """Return the settings of a side and its rho, which is 0 without the perturbation."""
        return {**self.space, RHO: ["0"] if side == WITHOUT else self.radii}

    def _repeats(self) -> list[Run]:
        """Return the best third of each side's trials with the other seeds; none while trials are missing."""
        runs = []
        for side in SIDES:
            for row, seed in product(self.repeated(side), SEARCH_SEEDS[1:]):
                runs.append(Run(side, row["config"], seed, "search", row["trial"]))
        return runs

    def repeated(self, side: str) -> list[Row]:
        """Return the best third of a side's trials, which are run with all seeds; none while trials are missing."""
        if any(len(self.tried(each)) < self.trials_of(each) for each in SIDES):
            return []
        rows = list(self.tried(side).values())[: self.trials_of(side)]
        return sorted(rows, key=judged, reverse=True)[: _repeated(len(rows))]

    def chosen(self, side: str) -> Config | None:
        """Return the settings with the best mean over the seeds; None while a run is missing."""
        trials, configs = [], []
        for row in self.repeated(side):
            rows = self.rows(side, row["config"], "search")
            if len(rows) < len(SEARCH_SEEDS):
                return None
            trials.append([(judged(each),) for each in rows])
            configs.append(row["config"])
        return configs[best(trials)] if trials else None

    def rows(self, side: str, config: Config, stage: str) -> list[Row]:
        """Return the finished runs with these settings."""
        seeds = SEARCH_SEEDS if stage == "search" else self._fresh_seeds()
        rows = [self.results.find(Run(side, config, seed, stage, 0)) for seed in seeds]
        return [row for row in rows if row is not None]

    def _fresh_seeds(self) -> range:
        return range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + self.fresh)

    def finalists(self) -> dict[str, Config]:
        """Return the settings of the final runs; none while a side's winner is not known.

        They are those of both winners and, if these differ in more than rho, of the control. Without it the difference
        would not be only the perturbation's.
        """
        found = {}
        for side in SIDES:
            config = self.chosen(side)
            if config is None:
                return {}
            found[side] = config
        control = {**found[WITH], RHO: found[WITHOUT][RHO]}
        if control != found[WITHOUT]:
            found[CONTROL] = control
        return found

    def _finals(self) -> list[Run]:
        """Return the final runs, seed by seed."""
        runs = []
        for seed, (side, config) in product(self._fresh_seeds(), self.finalists().items()):
            runs.append(Run(side, config, seed, "final", -1))
        return runs

    # -- a run

    def arguments(self, config: Config, seed: int) -> list[str]:
        """Return the arguments of the command's ``fit``."""
        given = [*self.options, *arguments(config), f"--seed_everything={seed}"]
        if module_of(self.command) == self.command:  # a LightningCLI, which has no --rho
            return [*given, "--trainer.callbacks+=lightning_flatlora.EFMLoRA", f"--trainer.callbacks.rho={config[RHO]}"]
        return [*given, *(f"--{name}={seed}" for name in seeds_of(self.command)), f"--rho={config[RHO]}"]

    def perform(self, run: Run) -> Row:
        """Train, and return the run's row, with the ``value`` of the weights that are kept, the worst if it diverged.

        Raises:
            StoppedError: the run has failed, or the user has stopped it.
            SystemExit: the run has not logged the metric.
        """
        began = time.perf_counter()
        folder = self.results.folder / run.name
        given = self.arguments(run.config, run.seed)
        fitted = fit(self.command, folder, given)
        metric = self.metric or fitted["monitor"]
        mode = self.mode or fitted["mode"]
        logged = set().union(*fitted["validations"])
        if metric is None:
            raise SystemExit(f"{run} keeps no checkpoint by a metric: name one, as in --metric val_loss --mode min")
        for name in filter(None, (metric, fitted["monitor"])):
            if name not in logged:
                known = ", ".join(sorted(logged - {"step", "epoch"})) or "nothing"
                raise SystemExit(
                    f"{run} has logged no {name} by the end of a validation, only {known}. If it ended before its "
                    "first one, make the epoch shorter with --trainer.limit_train_batches in place of "
                    "--trainer.max_steps"
                )
        value, on_test = value_of_kept(fitted, metric, mode), {}
        is_first = (run.side, run.stage, run.trial, run.seed) == (WITHOUT, "search", 0, SEARCH_SEEDS[0])
        # If there is nothing to test on, the search ends at its start, and not after its last trial.
        if self.tests and (run.stage == "final" or is_first):
            on_test = tested(self.command, folder, given, fitted["best"] or fitted["last"])
            value_on_test = finite_or_worst(_metric_of_test(on_test, metric), mode)
            value = value_on_test if run.stage == "final" else value
        if run.stage == "search":
            # With their optimizers, the checkpoints of all trials would fill a disk.
            for file in folder.glob("fit/checkpoints/*.ckpt"):
                file.unlink()
        # A run that was stopped and has gone on took longer than this process.
        seconds = max(time.perf_counter() - began, fitted["training_seconds"])
        judgement = {"metric": metric, "mode": mode, "value": value, "tested": on_test}
        return {**run.key(), "trial": run.trial, **judgement, "seconds": seconds, "commit": commit()}

    def failed(self, run: Run) -> Row:
        """Return the row of a failed run, which counts as one that diverged; another one has shown the metric."""
        shown = {name: self.results.rows[0][name] for name in ("metric", "mode")}
        judgement = {**shown, "value": finite_or_worst(math.nan, shown["mode"]), "tested": {}, "seconds": 0.0}
        return {**run.key(), "trial": run.trial, **judgement, "commit": commit()}


def _metric_of_test(tested: Row, metric: str) -> float:
    """Return what a test has logged in place of a validation's metric.

    Example:
        >>> _metric_of_test({"loss/test": 0.5}, "loss/val"), _metric_of_test({"test_loss": 0.5}, "eval_loss")
        (0.5, 0.5)
    """
    name = re.sub("(?<![a-z])(validation|valid|val|eval|dev)(?![a-z])", "test", metric, count=1)
    if name not in tested:
        raise SystemExit(f"the test has logged no {name}, only {', '.join(sorted(tested))}")
    return float(tested[name])


def _repeated(trials: int) -> int:
    """Count the trials of a side that are run with all seeds."""
    return min(trials, max(_LEAST_REPEATED, math.ceil(trials / 3)))


def judged(row: Row) -> float:
    """Return what a run is judged by, of which more is better."""
    value = float(row["value"])
    return -value if row["mode"] == "min" else value


def value_of_kept(fitted: Row, metric: str, mode: str) -> float:
    """Return the metric of the weights that a run keeps, the best ones by its monitor; the worst number if it diverged.

    Without a monitor they are the last ones.

    Example:
        >>> fitted = {"monitor": "val_loss", "mode": "min", "validations": [{"val_loss": 2.0}, {"val_loss": 3.0}]}
        >>> value_of_kept(fitted, "val_loss", "min")
        2.0
        >>> value_of_kept({**fitted, "validations": [{"val_loss": float("nan")}]}, "val_loss", "min")
        inf
    """
    monitor, kept = fitted["monitor"], fitted["validations"][-1]
    if monitor is not None:
        sign = 1 if fitted["mode"] == "min" else -1
        finite = [each for each in fitted["validations"] if math.isfinite(each.get(monitor, math.nan))]
        kept = min(finite, key=lambda each: sign * each[monitor], default={})
    return finite_or_worst(kept.get(metric, math.nan), mode)


def finite_or_worst(value: float, mode: str) -> float:
    """Return the value, or the worst number if the run has diverged."""
    worst = math.inf if mode == "min" else -math.inf
    return value if math.isfinite(value) else worst
