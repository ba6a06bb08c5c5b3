"""Which runs there are, which are done, and which may start now; several processes may work in one folder."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.evidence.run import Run
from recipes.evidence.search import Grid, arm_of, choose, common_grid, has_diverged
from recipes.evidence.verdict import ends_early
from recipes.evidence.workloads import (
    BASELINE,
    CANDIDATE,
    CHOSEN_OTHERWISE,
    COMPETITORS,
    EARLY_SEEDS,
    EXPLORED,
    MORE_DROPOUT,
    MORE_DROPOUT_RANK_2,
    ON_DROPOUT,
    ON_DROPOUT_RATES,
    ON_DROPOUT_RHO,
    ON_DROPOUT_RHO_0,
    PROBE,
    SEARCH_SEEDS,
    SEARCHED_AS,
    SEARCHES,
    WORKLOADS,
    Config,
    Settings,
    competitors_of,
)
from recipes.shared.ledger import Ledger, Row, entries

RESULTS = "results.jsonl"
STAGES = ("search", "test")
PRIMARY = (BASELINE, CANDIDATE)
_WAIT = 2.0  # seconds, while other processes do all that can be done now
_SECONDS = 25.0  # of a run where none is done yet: a rough guess for one thread of a CPU with fast bfloat16
_PASSES = {"fmlora": 2, "lora_sam": 2, "twice_the_steps": 2, "efmlora_twice_the_steps": 2, "fmlora_unsearched": 2}
key_of_row = entries("workload", "arm", "config", "seed", "stage", "settings")


@dataclass(frozen=True)
class Piece:
    """Runs that may be done in any order.

    Attributes:
        title: what they are.
        runs: that are known; more will be, once a choice has been made.
        number: of all runs.
        arms: whose runs they are.
    """

    title: str
    runs: list[Run]
    number: int
    arms: Sequence[str]


class Plan:
    """All runs of a workload, and a folder that knows which of them are done.

    Args:
        folder: of ``results.jsonl``.
        workload: its name.
        settings: of the workload, with the precision.
        arms: to run; methods are searched first, competitors wait for LoRA's search.
        stages: of :data:`STAGES`.
        seeds: of the runs on the test part.

    Attributes:
        searched_as: the workload whose searches choose the settings, most often its own.
        search_settings: of that one.
    """

    def __init__(
        self,
        folder: Path,
        workload: str,
        settings: Settings,
        arms: Sequence[str],
        stages: Sequence[str],
        seeds: Sequence[int],
    ) -> None:
        self.folder = folder
        self.workload = workload
        self.settings = settings
        self.arms = arms
        self.stages = stages
        self.seeds = seeds
        self.searched_as = SEARCHED_AS.get(workload, workload)
        self.search_settings = settings
        if self.searched_as != workload:
            self.search_settings = {**WORKLOADS[self.searched_as], "precision": settings["precision"]}
        self.ledger = Ledger(folder / RESULTS, key_of_row)
        self._choices: dict[tuple[str, Grid], Config] = {}

    def work(self, perform: Callable[[Run], Row], report: Callable[[Run], None]) -> None:
        """Do what is not done and not being done by another process, until nothing is left.

        Args:
            perform: does a run.
            report: is called with each run before it starts.
        """
        runs = self.open_runs()
        while runs:
            if not self.ledger.perform_first(runs, perform, report):
                time.sleep(_WAIT)
            self.ledger.reload()
            runs = self.open_runs()

    def open_runs(self) -> list[Run]:
        """The runs that are not done and wait for no other, in the order in which they should be done."""
        found: list[Run] = []
        for piece in self.pieces():
            found += self._missing(piece.runs)
        return found

    def pieces(self) -> list[Piece]:
        """All runs, in order: the primary hypothesis, its free competitors, the other methods, and what is explored."""
        grid = common_grid(self.chosen)
        primary = [arm for arm in self.arms if arm in PRIMARY]
        probe = [arm for arm in self.arms if arm == PROBE]
        free = [arm for arm in self.arms if arm in competitors_of(self.settings)]
        others = [[arm] for arm in self.arms if arm in SEARCHES and arm not in PRIMARY]
        explored = [arm for arm in self.arms if arm in EXPLORED or arm in CHOSEN_OTHERWISE]
        # What decides the verdict comes first, so that runs which are stopped early still answer something.
        found = [self._search(primary, grid), self._tests(primary, grid), self._tests(probe, grid)]
        always = len(found)
        found.append(self._tests(free, grid))
        for other in others:
            found += [self._search(other, grid), self._tests(other, grid)]
        if self.has_ended_early:
            found = found[:always]
        on_dropout = {ON_DROPOUT, ON_DROPOUT_RHO_0} & set(explored)
        if on_dropout or {MORE_DROPOUT, MORE_DROPOUT_RANK_2} & set(explored):
            found.append(self._search([BASELINE], grid.with_all_settings(BASELINE)))
        if on_dropout:
            found.append(self._search_on_dropout(grid))
        found.append(self._tests(explored, grid))
        return _without_shared(found)

    @property
    def has_ended_early(self) -> bool:
        """Whether the protocol's rule stops this workload."""
        return ends_early(self.accuracies(BASELINE), self.accuracies(CANDIDATE))

    def accuracies(self, arm: str) -> dict[int, float]:
        """Test accuracy of an arm with its chosen configuration, by seed, in percent."""
        config = self.config_of(arm, common_grid(self.chosen))
        if config is None:
            return {}
        return {row["seed"]: 100 * row["test_accuracy"] for row in self.test_rows(arm, config)}

    def test_rows(self, arm: str, config: Config) -> list[Row]:
        """The finished runs of an arm on the test part."""
        return self._rows(arm, config, self.seeds, "test")

    def search_rows(self, method: str, config: Config) -> list[Row]:
        """The finished runs of a trial."""
        return self._rows(method, config, SEARCH_SEEDS, "search")

    def config_of(self, arm: str, grid: Grid) -> Config | None:
        """What an arm is run with; None while that has not been chosen."""
        if arm == PROBE:
            return {}
        if arm in CHOSEN_OTHERWISE:
            return self._chosen_otherwise(arm, grid)
        changed = {**COMPETITORS, **EXPLORED}
        method = CANDIDATE if arm in EXPLORED else BASELINE
        chosen = self.chosen(arm if arm in SEARCHES else method, grid)
        return None if chosen is None else {**chosen, **changed.get(arm, {})}

    def chosen(self, method: str, grid: Grid) -> Config | None:
        """The trial that a method's search on a grid has chosen; None while it is not finished."""
        # Kept, since the rows of finished runs do not change, and each run asks again.
        if (method, grid) not in self._choices:
            trials = self._finished(method, self._trials(method, grid))
            if trials is None:
                return None
            self._choices[method, grid] = choose(trials)
        return self._choices[method, grid]

    def _chosen_otherwise(self, arm: str, grid: Grid) -> Config | None:
        if arm in (MORE_DROPOUT, MORE_DROPOUT_RANK_2):
            chosen = self.chosen(BASELINE, grid.with_all_settings(BASELINE))
            if chosen is None or arm == MORE_DROPOUT:
                return chosen
            return {**chosen, **COMPETITORS["rank_2"]}
        if arm in (ON_DROPOUT, ON_DROPOUT_RHO_0):
            on_dropout = self._finished(ON_DROPOUT, self._trials_on_dropout(grid)) or []
            if arm == ON_DROPOUT_RHO_0:
                on_dropout = [trial for trial in on_dropout if trial[0]["rho"] == 0]
            return choose(on_dropout) if on_dropout else None
        method = CHOSEN_OTHERWISE[arm]
        trials = self._finished(method, self._trials(method, grid))
        if trials is None:
            return None
        if arm == "lora_by_accuracy":
            return choose(trials, by_accuracy=True)
        return choose([trial for trial in trials if "rho" in trial[0]])

    def _trials(self, method: str, grid: Grid) -> list[Config]:
        """The configurations of a method's search, without those that can be of no use and have not been run."""

        def is_finished(config: Config) -> bool:
            return len(self.search_rows(method, config)) == len(SEARCH_SEEDS)

        def diverges(config: Config) -> bool:
            return is_finished(config) and has_diverged(self.search_rows(method, config))

        wanted = grid.trials(method, diverges)
        return [config for config in grid.trials(method) if config in wanted or is_finished(config)]

    def _trials_on_dropout(self, grid: Grid) -> list[Config]:
        """The configurations of EFMLoRA beside strong dropout and rank 2; none while that has not been chosen."""
        base = self.config_of(MORE_DROPOUT_RANK_2, grid)
        if base is None:
            return []
        found = []
        for factor in ON_DROPOUT_RATES:
            for rho in ON_DROPOUT_RHO:
                found.append({**base, "learning_rate": factor * base["learning_rate"], "rho": rho})
        return found

    def _finished(self, method: str, configs: Sequence[Config]) -> list[tuple[Config, list[Row]]] | None:
        """Trials with the rows of all seeds; None while one is not finished."""
        trials = []
        for config in configs:
            rows = self.search_rows(method, config)
            if len(rows) < len(SEARCH_SEEDS):
                return None
            trials.append((config, rows))
        return trials

    def progress(self) -> list[tuple[str, int, int, float]]:
        """Of each piece its title, finished runs, all runs, and the estimated seconds of what is left."""
        found = []
        for piece in self.pieces():
            missing = self._missing_of(piece)
            found.append((piece.title, piece.number - missing, piece.number, missing * self._seconds(piece.arms)))
        return found

    def _missing_of(self, piece: Piece) -> int:
        return piece.number - len(piece.runs) + len(self._missing(piece.runs))

    def _seconds(self, arms: Sequence[str]) -> float:
        """Mean seconds of a run of these arms."""
        of_arms: list[float] = []
        one_pass: list[float] = []
        for row in self.ledger.rows:
            # The probe and what has failed take less time, and each workload takes its own.
            if row["workload"] not in (self.workload, self.searched_as) or row["arm"] == PROBE or row["failed"]:
                continue
            one_pass.append(row["seconds"] / _PASSES.get(row["arm"], 1))
            if row["arm"] in arms:
                of_arms.append(row["seconds"])
        if of_arms:
            return statistics.mean(of_arms)
        return statistics.mean(one_pass or [_SECONDS]) * statistics.mean(_PASSES.get(arm, 1) for arm in arms)

    def _search(self, methods: Sequence[str], grid: Grid) -> Piece:
        runs: list[Run] = []
        if "search" in self.stages:
            for method in methods:
                runs += self._runs(method, self._trials(method, grid), SEARCH_SEEDS, "search")
        runs = _without_repeats(runs)
        return Piece(f"search, {', '.join(methods)}", runs, len(runs), methods)

    def _search_on_dropout(self, grid: Grid) -> Piece:
        runs: list[Run] = []
        if "search" in self.stages:
            runs = self._runs(ON_DROPOUT, self._trials_on_dropout(grid), SEARCH_SEEDS, "search")
        trials = len(ON_DROPOUT_RATES) * len(ON_DROPOUT_RHO)
        number = trials * len(SEARCH_SEEDS) if "search" in self.stages else 0
        return Piece(f"search, {ON_DROPOUT}", runs, number, [ON_DROPOUT])

    def _tests(self, arms: Sequence[str], grid: Grid) -> Piece:
        if "test" not in self.stages:
            return Piece("", [], 0, arms)
        configs = {arm: self.config_of(arm, grid) for arm in arms}
        # The rule for an early end reads the first seeds by their numbers, whatever --seeds names.
        early = [seed for seed in self.seeds if seed < EARLY_SEEDS]
        seeds = early if self.has_ended_early else self.seeds
        runs = self._tests_of(configs, seeds)
        # Runs whose configuration is not chosen yet are counted already, so that the total does not grow on the way.
        number = len(arms) * len(seeds) if None in configs.values() else len(runs)
        # Looked at after the first seeds, before the others.
        if set(PRIMARY) <= set(arms):
            first = self._tests_of(configs, early)
            runs = first if self._missing(first) else runs
        return Piece(f"{len(seeds)} seeds, {', '.join(arms)}", runs, number, arms)

    def _tests_of(self, configs: Mapping[str, Config | None], seeds: Iterable[int]) -> list[Run]:
        runs: list[Run] = []
        for seed in seeds:  # outermost, so that an early look shows pairs
            for arm, config in configs.items():
                if config is not None:
                    runs += self._runs(arm, [config], [seed], "test")
        return _without_repeats(runs)

    def _rows(self, arm: str, config: Config, seeds: Iterable[int], stage: str) -> list[Row]:
        rows = [self.ledger.find(run) for run in self._runs(arm, [config], seeds, stage)]
        return [row for row in rows if row is not None]

    def _missing(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if self.ledger.find(run) is None]

    def _runs(self, arm: str, configs: Sequence[Config], seeds: Iterable[int], stage: str) -> list[Run]:
        workload, settings = self.workload, self.settings
        if stage == "search":
            workload, settings = self.searched_as, self.search_settings
        runs = []
        for config in configs:
            name = arm_of(arm, config) if arm in SEARCHES else arm
            for seed in seeds:
                runs.append(Run(workload, settings, name, config, seed, stage))
        return runs


def _without_repeats(runs: Sequence[Run]) -> list[Run]:
    """All methods share the runs at size 0."""
    return list({str(run): run for run in runs}.values())


def _without_shared(pieces: Sequence[Piece]) -> list[Piece]:
    """Each run in the first piece that has it alone; pieces without a run of their own are left out."""
    seen: set[str] = set()
    found = []
    for piece in pieces:
        own = [run for run in piece.runs if str(run) not in seen]
        seen.update(str(run) for run in own)
        number = piece.number - len(piece.runs) + len(own)
        if number:
            found.append(replace(piece, runs=own, number=number))
    return found
