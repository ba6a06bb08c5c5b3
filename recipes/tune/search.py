"""The runs of a search: which come next, and how one of them runs in its own process."""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna import Trial

from recipes.studies.process import FailedError, commit, fit, module_of, tested
from recipes.studies.queue import Queue
from recipes.studies.rows import Row
from recipes.tune.answer import CONTROL, SIDES, WITH, WITHOUT, chosen
from recipes.tune.space import RHO, Config, Space, arguments, seeds_of, short, size, suggestions

SEARCH_SEEDS = (0, 1, 2)
"""All trials run with the first seed, and the best third of them with the others."""
FIRST_FRESH_SEED = 100
ROUND = 4  # trials of a side that may run at once; the first round's are spread over the space
_LEAST_REPEATED = 2  # trials of a side that run with all seeds
_FAILURES = 2  # of one run, after which it counts as diverged


class Run(NamedTuple):
    """A training.

    Attributes:
        side: "with" the perturbation, "without" it, or the "control".
        config: its settings; rho is 0 except with the perturbation.
        seed: value of ``--seed_everything`` and, in a recipe, of the data's seed unless it draws their parts.
        stage: "search", or "final" for a side's winner on fresh seeds.
        trial: number of its configuration.
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
        """A path that no other run has, and that every system accepts."""
        settings = re.sub(r"[^\w.=+-]+", "_", short(self.config))[:100]
        own = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.stage}/{settings}-{own}/seed-{self.seed}"

    def key(self) -> Row:
        """Return its attributes."""
        return self._asdict()


@dataclass
class Options:
    """What to search, as given on the command line.

    Attributes:
        recipe: a recipe's name, or the module of a LightningCLI.
        budget: trials of both sides together.
        search: an option of fit and its values, in place of the recipe's own search; may be given several times, and
            the picture is drawn against the first. Options that change together: model.lora.r/model.lora.lora_alpha 2/4
            8/16.
        rho: radii to try.
        fresh: seeds on which the winners are compared.
        test: compare the winners on the test data instead of validation data.
        metric: metric that validation logs; by default the one by which checkpoints are kept.
        mode: min or max of the metric.
        folder: output folder; by default runs/tune/RECIPE.
        storage: URL of an Optuna storage that several machines share; by default a file in the folder.
        study: the study's name in the storage; by default the recipe's.
    """

    recipe: str
    budget: int = 20
    search: list[list[str]] = field(default_factory=list)
    rho: list[float] = field(default_factory=lambda: [0.05, 0.5, 2.0, 8.0])
    fresh: int = 5
    test: bool = False
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    folder: Path | None = None
    storage: str | None = None
    study: str | None = None


@dataclass
class Search:
    """A search on each side, with equally many trials, and the winners of both on fresh seeds, with a control.

    A side's trials come in rounds of four. The rounds before decide which trials a round has, so the search finds the
    same with any number of workers. Every trial is trained to its end: early ends by the median of the trials before
    would have saved 1 and 2 % of the time of two searches, since later trials are better than the first ones.

    Attributes:
        options: what is searched.
        more: further options of the command's ``fit``.
        space: values of each setting and, last, of rho, whose first value is 0: no perturbation.
        queue: the queue, with the results so far.
        folder: folder of the runs.
        metric: metric of validation.
        mode: "min" or "max" of the metric.
    """

    options: Options
    more: Sequence[str]
    space: Space
    queue: Queue[Run]
    folder: Path
    metric: str
    mode: str
    _rounds: dict[tuple[str, int], list[Config]] = field(default_factory=dict, init=False)

    # -- what there is to do

    def open_runs(self) -> list[Run]:
        """Return the runs that may start now; none if all are done.

        They are the next round of each side, then all repeats, then all final runs.
        """
        runs = self._open_trials(WITHOUT) + self._open_trials(WITH)
        if runs:
            return sorted(runs, key=lambda run: run.trial)
        repeats = [run for run in self._repeats() if self.queue.find(run) is None]
        return repeats or [run for run in self._finals() if self.queue.find(run) is None]

    def announce(self, run: Run) -> None:
        """Say which run starts now, and how many are left, at most: a control may not be needed."""
        trials = [self.trials_of(side) for side in SIDES]
        repeats = sum(map(_repeated, trials)) * (len(SEARCH_SEEDS) - 1)
        finals = self.options.fresh * (len(SIDES) + (len(self.space) > 1))
        left = max(1, sum(trials) + repeats + finals - len(self.queue.rows))
        hours = left * self.seconds_of_a_run() / 3600
        time_left = f", about {hours:.1f} hours for one worker" if hours else ""
        print(f"\nRuns left, at most: {left}{time_left}. Next: {run}", flush=True)

    def seconds_of_a_run(self) -> float:
        """Return the mean over the runs that have not failed; 0 if there is none yet."""
        whole = [float(row["seconds"]) for row in self.queue.rows if row["seconds"]]
        return mean(whole) if whole else 0.0

    def trials_of(self, side: str) -> int:
        """Return a side's number of trials: as many as the other's, or all settings that exist."""
        return min(self.options.budget // 2, size(self.space_of(side)))

    def tried(self, side: str) -> dict[int, Row]:
        """Return the finished trials of a side with the first seed, by their numbers."""
        with_first_seed = ("search", side, SEARCH_SEEDS[0])
        rows = [row for row in self.queue.rows if (row["stage"], row["side"], row["seed"]) == with_first_seed]
        return {row["trial"]: row for row in sorted(rows, key=lambda row: row["trial"])}

    def space_of(self, side: str) -> Space:
        """Return the settings of a side and its rho, which is 0 without the perturbation."""
        radii = self.space[RHO]
        return {**self.space, RHO: radii[:1] if side == WITHOUT else radii[1:]}

    def _open_trials(self, side: str) -> list[Run]:
        """Return the runs that are not done in a side's first unfinished round."""
        tried, trials = self.tried(side), self.trials_of(side)
        first = len(tried) // ROUND * ROUND
        missing = [number for number in range(first, min(first + ROUND, trials)) if number not in tried]
        if not missing:
            return []
        if (side, first) not in self._rounds:
            judgements = [(tried[number]["config"], judged(tried[number])) for number in range(first)]
            number = min(ROUND, size(self.space_of(side)) - first)
            self._rounds[side, first] = suggestions(self.space_of(side), judgements, number)
        configs = self._rounds[side, first]
        return [Run(side, configs[number - first], SEARCH_SEEDS[0], "search", number) for number in missing]

    def _repeats(self) -> list[Run]:
        """Return the best third of each side's trials with the other seeds."""
        repeated = product(self.repeated(WITHOUT) + self.repeated(WITH), SEARCH_SEEDS[1:])
        return [Run(row["side"], row["config"], seed, "search", row["trial"]) for row, seed in repeated]

    def repeated(self, side: str) -> list[Row]:
        """Return the best third of a side's trials, which are run with all seeds, when all trials are done."""
        rows = list(self.tried(side).values())[: self.trials_of(side)]
        return sorted(rows, key=judged)[: _repeated(len(rows))]

    def _finals(self) -> list[Run]:
        """Return the final runs, seed by seed, of both winners and, if they differ in more than rho, the control."""
        seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + self.options.fresh)
        seeds_and_winners = product(seeds, chosen(self.queue.rows, self.mode).items())
        return [Run(side, config, seed, "final", -1) for seed, (side, config) in seeds_and_winners]

    # -- a run

    def arguments(self, config: Config, seed: int) -> list[str]:
        """Return the arguments of the command's ``fit``."""
        given = [*self.more, *arguments(config), f"--seed_everything={seed}"]
        recipe = self.options.recipe
        if module_of(recipe) == recipe:  # a LightningCLI, which has no --rho
            return [*given, "--trainer.callbacks+=lightning_flatlora.EFMLoRA", f"--trainer.callbacks.rho={config[RHO]}"]
        return [*given, *(f"--{name}={seed}" for name in seeds_of(recipe)), f"--rho={config[RHO]}"]

    def perform(self, run: Run, trial: Trial) -> Row:
        """Do a run; one that has failed twice counts as diverged, so that the search can end.

        This does not apply to a winner on fresh seeds, whose settings worked in the search.

        Args:
            run: run to do.
            trial: its trial in Optuna's study.

        Returns:
            The ``value`` of the kept weights, the worst one if the run diverged; what was ``tested``; ``seconds`` and
            ``commit``.

        Raises:
            FailedError: the run failed.
            StoppedError: the user stopped it.
            MisconfigurationException: the run did not log the metric.
        """
        for name, values in self.space.items():
            trial.suggest_categorical(name, values)  # for Optuna's own pictures: this finds the queued values
        # While no run has ended well, the cause may be common to all of them.
        if self.queue.rows and self.queue.failures(run) >= _FAILURES:
            print(f"{run} has failed twice and counts as diverged", flush=True)
            return self._row(math.nan)
        try:
            row = self._trained(run)
        except FailedError as failure:
            if run.stage == "final" and run.side != CONTROL:
                raise MisconfigurationException(
                    f"{run} has failed, with the error above. The same command resumes the search"
                ) from failure
            print(f"\n{run} has failed, with the error above", flush=True)
            raise
        # With their optimizers, the checkpoints of all trials would fill a disk.
        if run.stage == "search":
            for file in (self.folder / run.name).glob("fit/checkpoints/*.ckpt"):
                file.unlink()
        print(f"{run}: {self.metric} {row['value']:.4g}", flush=True)
        return row

    def _trained(self, run: Run) -> Row:
        began = time.perf_counter()
        folder = self.folder / run.name
        given = self.arguments(run.config, run.seed)
        fitted = fit(self.options.recipe, folder, given)
        self._check(run, fitted)
        value, on_test = value_of_kept(fitted, self.metric), {}
        # If there is nothing to test on, the search ends at its start, and not after its last trial.
        if self.options.test and (run.stage == "final" or not self.queue.rows):
            kept = fitted["best"] or fitted["last"]
            if not kept:  # the test would use untrained weights
                raise MisconfigurationException(f"{run} has kept no checkpoint to test: keep one, or leave out --test")
            on_test = tested(self.options.recipe, folder, given, kept)
            value_on_test = _metric_of_test(on_test, self.metric)
            value = value_on_test if run.stage == "final" else value
        # A run that was stopped and resumed took longer than this process.
        seconds = max(time.perf_counter() - began, fitted["training_seconds"])
        return self._row(value, on_test, seconds)

    def _row(self, value: float, on_test: Row | None = None, seconds: float = 0.0) -> Row:
        judgement = {"metric": self.metric, "mode": self.mode, "value": finite_or_worst(value, self.mode)}
        return {**judgement, "tested": on_test or {}, "seconds": seconds, "commit": commit()}

    def _check(self, run: Run, fitted: Row) -> None:
        """Refuse a run that has not logged the metrics that judge it."""
        logged = set().union(*fitted["validations"])
        missing = {self.metric, fitted["monitor"]} - {None, *logged}
        if missing:
            known = ", ".join(sorted(logged - {"step", "epoch"})) or "nothing"
            raise MisconfigurationException(
                f"{run} has logged no {' and no '.join(sorted(missing))} by the end of a validation, only {known}. "
                "If it ended before its first one, make the epoch shorter with --trainer.limit_train_batches in place "
                "of --trainer.max_steps"
            )


def _metric_of_test(tested: Row, metric: str) -> float:
    """Return the metric of a test that matches a validation's.

    Example:
        >>> _metric_of_test({"loss/test": 0.5}, "loss/val"), _metric_of_test({"test_loss": 0.5}, "eval_loss")
        (0.5, 0.5)
    """
    name = re.sub("(?<![a-z])(validation|valid|val|eval|dev)(?![a-z])", "test", metric, count=1)
    if name not in tested:
        raise MisconfigurationException(f"the test has logged no {name}, only {', '.join(sorted(tested))}")
    return float(tested[name])


def _repeated(trials: int) -> int:
    """Count the trials of a side that run with all seeds."""
    return min(trials, max(_LEAST_REPEATED, math.ceil(trials / 3)))


def judged(row: Row) -> float:
    """Return the value that judges a run, where less is better."""
    return less_is_better(row["value"], row["mode"])


def less_is_better(value: float, mode: str) -> float:
    """Return a value where less is better; infinity for a run that has diverged."""
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def value_of_kept(fitted: Row, metric: str) -> float:
    """Return the metric of the weights that a run keeps: the best ones by its monitor or, without one, the last ones.

    It is not finite if the run has diverged.

    Example:
        >>> fitted = {"monitor": "val_loss", "mode": "min", "validations": [{"val_loss": 2.0}, {"val_loss": 3.0}]}
        >>> value_of_kept(fitted, "val_loss")
        2.0
    """
    monitor, kept = fitted["monitor"], fitted["validations"][-1]
    if monitor is not None:
        kept = min(fitted["validations"], key=lambda each: less_is_better(each.get(monitor, math.nan), fitted["mode"]))
        if not math.isfinite(kept.get(monitor, math.nan)):
            return math.nan
    return float(kept.get(metric, math.nan))


def finite_or_worst(value: float, mode: str) -> float:
    """Return the value, or the worst number if the run has diverged."""
    worst = math.inf if mode == "min" else -math.inf
    return value if math.isfinite(value) else worst
