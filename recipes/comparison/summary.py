"""What the rows of all runs say: accuracy with its error, differences to LoRA with a paired test, cost, correlation."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from scipy import stats

from recipes.comparison.methods import ALL, METHODS, VARIANTS
from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate, estimate, holm
from recipes.studies.plan import Config

BASELINE = "lora"


@dataclass(frozen=True)
class Outcome:
    """What a method with its chosen configuration has reached on a task, over the seeds.

    Attributes:
        method: its name.
        config: the chosen configuration.
        edge: "lowest" or "highest" where the chosen value is at that end of its grid, so that a better one may lie
            beyond; else empty.
        runs: the rows that were judged on the test part, by seed.
        accuracy: in percent.
        gain: accuracy minus LoRA's with the same seed, in percentage points; None for LoRA itself and without it.
        p: of a paired t-test over the seeds that the gain is not 0, two-sided; None where there is no gain, only one
            seed, or the same gain with all seeds.
        p_holm: the same, corrected by Holm over the task's methods, or over its variants.
        excess_loss: loss on the test part minus LoRA's with the same seed, in nats; None for LoRA and without it.
        cost: processor time of a training step (on a GPU, its time), relative to LoRA's; None without LoRA.
        sharpness_ratios: sharpness relative to LoRA's with the same seed, sorted; empty without LoRA's or its own.
    """

    method: str
    config: Config
    edge: str
    runs: dict[int, Row]
    accuracy: Estimate
    gain: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None
    excess_loss: Estimate | None = None
    cost: float | None = None
    sharpness_ratios: Sequence[float] = ()

    def mean(self, name: str) -> float | None:
        """Mean over the seeds of an entry of the rows; None where they don't have it."""
        values = [row[name] for row in self.runs.values() if name in row]
        return statistics.mean(values) if values else None


def outcomes(rows: Sequence[Row], task: str) -> list[Outcome]:
    """All methods of a task that have been judged on the test part, in the order of the methods.

    Rows of other settings than the task's last one are left out.
    """
    task_rows = of_task(rows, task)
    by_method = {name: _outcome(task_rows, name) for name in ALL}
    done = {name: outcome for name, outcome in by_method.items() if outcome}
    if BASELINE not in done:
        return list(done.values())
    base = done[BASELINE].runs
    compared = [_compared(outcome, base) for outcome in done.values()]
    corrected = corrected_p_values({task: compared})
    return [replace(outcome, p_holm=corrected.get((task, outcome.method))) for outcome in compared]


def corrected_p_values(by_task: Mapping[str, Sequence[Outcome]]) -> dict[tuple[str, str], float]:
    """Holm's correction over all methods of all these tasks, and over all variants, by task and method."""
    tested = {}
    for task, task_outcomes in by_task.items():
        for outcome in task_outcomes:
            if outcome.p is not None:
                tested[task, outcome.method] = outcome.p
    corrected: dict[tuple[str, str], float] = {}
    for family in (METHODS, VARIANTS):  # what is tried beyond the question does not weaken the answer
        corrected |= holm({key: p for key, p in tested.items() if key[1] in family})
    return corrected


def of_task(rows: Sequence[Row], task: str) -> list[Row]:
    """The rows of a task that have the settings of its last one."""
    task_rows = [row for row in rows if row["task"] == task]
    return [row for row in task_rows if row["settings"] == task_rows[-1]["settings"]]


def tuning(rows: Sequence[Row], method: str) -> list[tuple[Config, Estimate]]:
    """Of one task, the validation accuracy in percent of each configuration of a method, by its own parameter."""
    tried = [row for row in rows if (row["method"], row["part"]) == (method, "validation")]
    candidates = _validated(tried, method, tried[-1]["config"]) if tried else []
    configs: list[Config] = []
    for row in candidates:
        if row["config"] not in configs:
            configs.append(row["config"])
    curve = []
    for config in sorted(configs, key=lambda config: list(config.values())):
        curve.append((config, estimate([100 * row["accuracy"] for row in candidates if row["config"] == config])))
    return curve


class Deviation(NamedTuple):
    """How a run differs from what all methods reach on average with its seed.

    Attributes:
        method: its name.
        sharpness: relative to the mean of the seed.
        error: on the test part, minus the mean of the seed, in percentage points.
    """

    method: str
    sharpness: float
    error: float


def within_seeds(outcomes: Sequence[Outcome], name: str = "sharpness") -> list[Deviation]:
    """What is left of sharpness and test error when the seed's own part, the training examples above all, is taken out.

    Args:
        outcomes: of one task; variants, which not every task has, and those without that sharpness are left out, as
            are seeds that one of the others lacks.
        name: "sharpness" or "expected_sharpness".
    """
    having = []
    for outcome in outcomes:
        if outcome.method in METHODS and all(name in row for row in outcome.runs.values()):
            having.append(outcome)
    if not having:
        return []
    deviations = []
    for seed in sorted(set.intersection(*(set(o.runs) for o in having))):
        sharpness = statistics.mean(o.runs[seed][name] for o in having)
        accuracy = statistics.mean(o.runs[seed]["accuracy"] for o in having)
        for o in having:
            row = o.runs[seed]
            deviations.append(Deviation(o.method, row[name] / sharpness, 100 * (accuracy - row["accuracy"])))
    return deviations


def sharpness_correlation(outcomes: Sequence[Outcome], name: str = "sharpness") -> float:
    """Spearman's rank correlation of a sharpness with the test error over :func:`within_seeds`.

    Without a p-value: runs of one method are alike, so that they count for less than their number.
    """
    pairs = [deviation[1:] for deviation in within_seeds(outcomes, name)]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return math.nan
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def name_with_seeds(outcome: Outcome, seeds: int) -> str:
    """A method's name, with the number of its seeds where it has not all of them."""
    return outcome.method if len(outcome.runs) == seeds else f"{outcome.method} ({len(outcome.runs)} seeds)"


def _outcome(rows: Sequence[Row], method: str) -> Outcome | None:
    """With the configuration that the last run on the test part had: what the plan had chosen by then."""
    method_rows = [row for row in rows if row["method"] == method]
    tested = [row for row in method_rows if row["part"] == "test"]
    if not tested:
        return None
    config = tested[-1]["config"]
    runs = {row["seed"]: row for row in tested if row["config"] == config}
    accuracies = [100 * row["accuracy"] for row in runs.values()]
    return Outcome(method, config, _edge(method_rows, method, config), runs, estimate(accuracies))


def _edge(rows: Sequence[Row], method: str, config: Config) -> str:
    """The end of the grid at which the chosen value lies; nothing where two hyper-parameters are chosen at once."""
    parameter, validated = ALL[method].parameter, _validated(rows, method, config)
    values = sorted({row["config"][parameter] for row in validated})
    if len(values) < 2 or len(values) < len({tuple(row["config"].items()) for row in validated}):
        return ""
    return {values[0]: "lowest", values[-1]: "highest"}.get(config[parameter], "")


def _validated(rows: Sequence[Row], method: str, config: Config) -> list[Row]:
    """What a configuration was chosen among, all at one learning rate where the method takes it from another one."""
    tried = [row for row in rows if (row["method"], row["part"]) == (method, "validation")]
    if ALL[method].start is None:
        return tried
    return [row for row in tried if row["config"].get("learning_rate") == config.get("learning_rate")]


def _compared(outcome: Outcome, base: dict[int, Row]) -> Outcome:
    seeds = sorted(outcome.runs.keys() & base.keys())
    if not seeds:
        return outcome
    cost = statistics.median(_step(outcome.runs[seed]) / _step(base[seed]) for seed in seeds)
    changed: dict[str, Any] = {"cost": cost, "sharpness_ratios": _sharpness_ratios(outcome.runs, base)}
    if outcome.method != BASELINE:
        gains = [100 * (outcome.runs[seed]["accuracy"] - base[seed]["accuracy"]) for seed in seeds]
        losses = [outcome.runs[seed]["loss"] - base[seed]["loss"] for seed in seeds]
        changed |= {"gain": estimate(gains), "excess_loss": estimate(losses), "p": _p_value(outcome.runs, base)}
    return replace(outcome, **changed)


def _sharpness_ratios(runs: dict[int, Row], base: dict[int, Row]) -> list[float]:
    both = [(runs[seed], base[seed]) for seed in runs.keys() & base.keys()]
    sharpnesses = [(own.get("sharpness"), other.get("sharpness")) for own, other in both]
    return sorted(own / other for own, other in sharpnesses if own is not None and other)


def _step(row: Row) -> float:
    return float(row["processor_seconds_per_step" if row["device"].endswith("CPU") else "seconds_per_step"])


def _p_value(runs: dict[int, Row], base: dict[int, Row]) -> float | None:
    seeds = sorted(runs.keys() & base.keys())
    if len(seeds) < 2:
        return None
    pairs = [(runs[seed]["accuracy"], base[seed]["accuracy"]) for seed in seeds]
    # Rounded, since equal differences may differ in their last bits.
    if len({round(own - other, 9) for own, other in pairs}) == 1:  # no spread, so the statistic says nothing
        return 1.0 if pairs[0][0] == pairs[0][1] else None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
