"""Write the study's figures, computed from the published rows, into its pages; the words stay.

From the root of a clone: ``PYTHONPATH=. python docs/results/figures.py``. The code that made the rows of W1 to W6 is
archived.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matrix_b  # in this folder
import matrix_rates
import matrix_replication
import matrix_rule
import matrix_table
from figures_p1 import around, doubts, higher_rate, needs_an_adapter, other_methods, p_value

from recipes.studies.rows import Row, read
from recipes.studies.statistics import Estimate, estimate, holm, with_interval

RESULTS = Path(__file__).parent
DOCS = RESULTS.parent
BySeed = Mapping[int, Row]


class Runs:
    """The runs of one of the study's workloads, either on test or from its searches."""

    def __init__(self, workload: str, stage: str = "test") -> None:
        self.arms: dict[tuple[str, frozenset[tuple[str, Any]]], dict[int, Row]] = defaultdict(dict)
        for file in RESULTS.glob(f"evidence_{workload}*.jsonl"):
            for row in read(file):
                # A workload's other files have rows of other kinds.
                is_run = f"{'test' if stage == 'test' else 'validation'}_accuracy" in row
                if row.get("workload") == workload and row.get("stage") == stage and is_run:
                    self.arms[row["arm"], frozenset(row["config"].items())][row["seed"]] = row

    def __call__(self, arm: str, **config: float | None) -> BySeed:
        """Return an arm's only runs with these settings; None means that the runs don't have the setting."""
        found = []
        for (name, settings), rows in self.arms.items():
            if name == arm and all(dict(settings).get(entry) == value for entry, value in config.items()):
                found.append(rows)
        (only,) = found
        return only


def difference(one: BySeed, other: BySeed) -> Estimate:
    """Return the difference in points of test accuracy, paired by seed."""
    seeds = [seed for seed in one if seed in other]
    return estimate([100 * (one[seed]["test_accuracy"] - other[seed]["test_accuracy"]) for seed in seeds])


def differences(one: BySeed, *others: BySeed) -> list[str]:
    """Return the number of seeds, which all have in common, and the difference to each."""
    found = [difference(one, other) for other in others]
    (seeds,) = {each.values for each in found}
    return [str(seeds), *map(with_interval, found)]


def accuracy(rows: BySeed) -> float:
    """Return the mean test accuracy in percent."""
    return 100 * statistics.mean(row["test_accuracy"] for row in rows.values())


# -- the study's first table


def over_small_tasks(method: str) -> Estimate:
    """Return a method's mean difference to LoRA over six tasks, in points of test accuracy, paired by seed."""
    by_run: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in read(RESULTS / "comparison.jsonl"):
        if row["part"] == "test":
            by_run[row["task"], row["method"]][row["seed"]] = 100 * row["accuracy"]
    tasks = {task for task, _ in by_run}
    shared = set.intersection(*(set(by_run[task, each]) for task, each in product(tasks, ("lora", method))))
    means = []
    for seed in shared:
        means.append(statistics.mean(by_run[task, method][seed] - by_run[task, "lora"][seed] for task in tasks))
    return estimate(means)


def small_tasks() -> str:
    """Return the row of the comparison over six tasks."""
    found = over_small_tasks("efmlora")
    return f"| Six small tasks, mean | {found.values} | {with_interval(found)} | | plain LoRA |"


def many_classes() -> str:
    """Return the row of W1."""
    runs = Runs("w1")
    lora = runs("lora")
    seeds, to_lora, to_probe = differences(runs("efmlora"), lora, runs("linear_probe"))
    row = lora[0]
    what = f"W1: {1 / row['chance']:.0f} classes, {row['settings']['shots']} examples each"
    return f"| {what} | {seeds} | {to_lora} | {to_probe} | LoRA with dropout {row['config']['dropout']}, as tuned |"


def against_a_small_adapter(what: str, efmlora: BySeed, lora: BySeed, probe: BySeed, small: BySeed) -> str:
    """Return a row that compares with LoRA of a small rank in the last column."""
    seeds, to_lora, to_probe, to_small = differences(efmlora, lora, probe, small)
    its = small[0]["config"]
    matched = f"rank {its['rank']}, dropout {its['dropout']}: {to_small}"
    return f"| {what} | {seeds} | {to_lora} | {to_probe} | {matched} |"


def wrong_labels() -> str:
    """Return the row of W2."""
    runs = Runs("w2")
    lora = runs("lora", dropout=0.9)
    what = f"W2: {100 * lora[0]['settings']['noise']:g} % of the labels wrong"
    small = runs("rank_2", dropout=0.9)
    return against_a_small_adapter(what, runs("efmlora"), lora, runs("linear_probe"), small)


def several_tasks(what: str, matched: str) -> list[str]:
    """Return both rows of W3 or of W5."""
    name = what.partition(":")[0]
    runs = Runs(name.lower())
    probe, lora, small = runs("linear_probe"), runs("lora", dropout=0.3), runs("rank_2_more_dropout")
    efmlora, at_rho_0 = runs("efmlora_on_dropout"), runs("efmlora_on_dropout_rho_0")
    seeds, to_lora, to_probe = differences(efmlora, at_rho_0, probe)
    config = efmlora[0]["config"]
    both = f"{name}, both with rank {config['rank']}, dropout {config['dropout']}"
    return [
        against_a_small_adapter(what, runs("efmlora"), lora, probe, small),
        f"| {both} | {seeds} | {to_lora} | {to_probe} | {matched} |",
    ]


def finished_adapters() -> str:
    """Return the row of W4."""
    found = []
    for workload in ("w1", "w2", "w3", "w5"):
        judged: dict[str, dict[int, Row]] = defaultdict(dict)
        for row in read(RESULTS / f"evidence_{workload}_robustness.jsonl"):
            judged[row["arm"]][row["seed"]] = row["conditions"]
        for condition in set(judged["lora"][0]) - {"as_trained"}:
            found.append(estimate([_loss(judged, seed, condition) for seed in judged["lora"]]))
    (seeds,) = {each.values for each in found}
    above = sum(each.mean > each.interval for each in found)
    below = sum(-each.mean > each.interval for each in found)
    what = f"W4: finished adapters rounded, rescaled or fed typos, {len(found)} comparisons"
    return f"| {what} | {seeds} | {above} intervals above 0, {below} below | | LoRA |"


def _loss(judged: Mapping[str, BySeed], seed: int, condition: str) -> float:
    """Return how much more accuracy LoRA loses under a condition than EFMLoRA."""
    lost = {}
    for arm in ("lora", "efmlora"):
        under = judged[arm][seed]
        lost[arm] = under["as_trained"]["accuracy"] - under[condition]["accuracy"]
    return lost["lora"] - lost["efmlora"]


def more_data() -> str:
    """Return the row of W6."""
    runs, searched = Runs("w6"), Runs("w6", "search")
    # rho 0 is LoRA without regularization; both searches share its rows.
    trials = {}
    for (arm, settings), rows in searched.arms.items():
        if arm == "efmlora" or set(dict(settings)) == {"learning_rate"}:
            trials[settings] = statistics.mean(row["validation_loss"] for row in rows.values())
    chosen = dict(min(trials, key=lambda settings: trials[settings]))
    lora = runs("lora", dropout=0.3)
    seeds, to_lora, to_probe = differences(runs("lora", dropout=None, **chosen), lora, runs("linear_probe"))
    what = f"W6: {lora[0]['settings']['shots']:,} film reviews per class"
    rho = chosen.get("rho", 0)
    return f"| {what} | {seeds} | {to_lora} | {to_probe} | plain LoRA: rho {rho} was chosen |"


# -- the text


def flatness() -> list[str]:
    """Return the passages on slopes and curvatures."""
    measured: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in read(RESULTS / "evidence_w1_flatness.jsonl"):
        measured[row["arm"]][row["seed"]] = row["validation"]

    def ratio(measure: str, part: str) -> str:
        logs = []
        for seed, lora in measured["lora"].items():
            logs.append(math.log(measured["efmlora"][seed][measure][part] / lora[measure][part]))
        found = estimate(logs)
        low, mean, high = (math.exp(found.mean + sign * found.interval) for sign in (-1, 0, 1))
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]"

    return [
        f"its slope is {ratio('gradient', 'B')} of tuned LoRA's, its curvature (trace of the Hessian) "
        f"{ratio('trace', 'B')}.",
        f"their slope is {ratio('gradient', 'full')} of LoRA's, their curvature {ratio('trace', 'full')}.",
    ]


def corrections() -> list[str]:
    """Return the passages on W1 to W6 outside of the table."""
    w1, w2, w3 = Runs("w1"), Runs("w2"), Runs("w3")
    found = [
        difference(w1("efmlora"), w1("lora")),
        difference(w2("efmlora"), w2("lora", dropout=0.9)),
        difference(w3("efmlora"), w3("lora", dropout=0.3)),
    ]
    _, of_w2, _ = holm([p_value(each) for each in found])
    return [
        f"with dropout 0.3, is {with_interval(difference(w2('efmlora'), w2('lora', dropout=0.3)))}.",
        f"EFMLoRA {accuracy(w3('efmlora')):.2f}, and the LoRA of the table {accuracy(w3('lora', dropout=0.3)):.1f}.",
        f"p is {of_w2:.3f} by Holm's method",
    ]


def separate_rates() -> tuple[list[str], list[str]]:
    """Return the passages of the study and of the guide on separate rates."""
    searched: dict[float, list[float]] = defaultdict(list)
    arms: dict[tuple[int | None, float | None], dict[int, Row]] = defaultdict(dict)
    for row in read(RESULTS / "head_rate.jsonl"):
        config = row["config"]
        if row["stage"] == "search":
            searched[config["rho"]].append(row["validation_loss_scaled"])
        else:
            arms[config.get("rank"), config.get("rho")][row["seed"]] = row
    rho = min(searched, key=lambda each: statistics.mean(searched[each]))
    small, plain, efmlora = arms[2, None], arms[None, None], arms[2, rho]
    runs = Runs("w5")
    one_rate = {seed: row for seed, row in runs("efmlora_on_dropout").items() if seed in small}
    probe = {seed: row for seed, row in runs("linear_probe").items() if seed in small}
    study = [
        f"{len(small)} seeds: LoRA of rank 2 with dropout 0.9 (head 4e-3, adapter 1e-4) has {accuracy(small):.2f}",
        f"(head 2e-3, adapter 1e-4) {accuracy(plain):.2f}",
        f"one rate has {accuracy(one_rate):.2f}, which is {with_interval(difference(one_rate, small))} against",
        f"the probe {accuracy(probe):.2f}.",
        f"with the rho of {rho:g}, the smallest tried, it has {accuracy(efmlora):.2f}, a difference of "
        f"{with_interval(difference(efmlora, small))}.",
    ]
    guide = [f"{accuracy(small):.1f} %; EFMLoRA with these {accuracy(efmlora):.1f} % ({len(small)} seeds)"]
    return study, guide


# -- the replication of column A


def replication() -> list[str]:
    """Return both whole tables, since their rows differ in numbers only."""
    cost = matrix_replication.costs(read(RESULTS / "matrix_a.jsonl"))
    rows = read(RESULTS / "matrix_replication.jsonl")
    return [matrix_replication.table(rows, cost), matrix_replication.audit_table(rows, cost)]


def replicated() -> list[str]:
    """Return the study's passages on the replication."""
    tests: dict[tuple[str, int, str, float | None], dict[int, Row]] = defaultdict(dict)
    for row in read(RESULTS / "matrix_replication.jsonl"):
        if row["stage"] == "final":
            tests[row["arm"], row["rank"], row["rate"], row["strength"]][row["seed"]] = row["test"]
    lora, random = tests["LoRA", 32, "3e-3", None], tests["RandomPerturbation", 32, "3e-3", 0.1]
    audited, efmlora = tests["LoRA", 128, "3e-3", None], tests["EFMLoRA", 32, "3e-3", 0.8]

    def mean(arm: BySeed, disturbance: str) -> str:
        return f"{statistics.mean(each[disturbance] for each in arm.values()):.2f}"

    def against(other: BySeed, arm: BySeed, disturbance: str) -> str:
        return with_interval(estimate([arm[seed][disturbance] - other[seed][disturbance] for seed in other]))

    base = "base, noise 0.3"
    losses = f"{mean(random, base)} nats per token and LoRA with rank 32 {mean(lora, base)}"
    gain, cost = against(lora, random, base), against(lora, random, "clean")
    to_audited = f"{against(audited, random, base)} under noise and {against(audited, random, 'clean')} without"
    return [
        f"RandomPerturbation (sigma 0.1) has {losses}, a difference of {gain}, for {cost} without noise",
        f"LoRA with rank 128 is {to_audited}",
        f"EFMLoRA (rho 0.8) differs from rank 128 by {against(audited, efmlora, base)} under noise",
    ]


# -- column B


def relearned() -> tuple[list[str], str]:
    """Return the passages on column B: the study's, and that on its secondary attacks."""
    rows = read(RESULTS / "matrix_b.jsonl")
    settings, finals = matrix_b.settings_of(rows), matrix_b.finals_of(rows)
    recalled: dict[str, list[str]] = {}
    by_seed: dict[str, list[list[float]]] = {}
    likelihoods: dict[str, list[float]] = {}
    for arm in (matrix_b.LORA, matrix_b.FMLORA):
        choice = matrix_b.chosen(settings, arm)
        for steps in ("0", matrix_b.PRIMARY):
            mean = statistics.mean(matrix_b.recalls(finals, choice, steps))
            recalled.setdefault(arm, []).append(f"{mean:.2f}")
        likelihoods[arm] = matrix_b.likelihoods(finals, choice)
        of_arm = finals[choice.run.name]
        by_seed[arm] = [of_arm[seed]["other_rates"] for seed in matrix_b.ATTACKED_AGAIN]
    (lora_before, lora), (before, after) = recalled[matrix_b.LORA], recalled[matrix_b.FMLORA]
    at_other_rates = []
    for place in range(len(matrix_b.OTHER_RATES)):
        pairs = zip(by_seed[matrix_b.FMLORA], by_seed[matrix_b.LORA], strict=True)
        at_other_rates.append(with_interval(estimate([mine[place] - its[place] for mine, its in pairs])))
    pairs_of_likelihoods = zip(likelihoods[matrix_b.FMLORA], likelihoods[matrix_b.LORA], strict=True)
    of_fmlora = estimate([mine - its for mine, its in pairs_of_likelihoods])
    return (
        [
            f"LoRA recalls {lora} of them ({lora_before} before the attack), FMLoRA {after} ({before})",
            f"their log-likelihood differs by {with_interval(of_fmlora)}, p {p_value(of_fmlora):.2f} uncorrected",
        ],
        f"an attack with the rates 3e-4 and 3e-3, FMLoRA's difference is {' and '.join(at_other_rates)}",
    )


# -- rows and hours


def seconds_of(row: Row) -> float:
    """Return a run's seconds; of processor time, if the row has them."""
    seconds = row.get("processor_seconds", row["seconds"])
    return sum(seconds.values()) if isinstance(seconds, dict) else seconds


def cost() -> list[str]:
    """Return the passages on the number of rows and on hours."""
    found = []
    names = ["evidence_*", "comparison", "head_rate", "radius_tasks", "p1", "p1_control", "p1_rate", "arms"]
    for files in (*names, "matrix_a", "matrix_rates", "matrix_b"):
        rows = []
        for file in RESULTS.glob(f"{files}.jsonl"):
            rows += read(file)
        # Rows of runs that were only evaluated have no processor time.
        hours = sum(seconds_of(row) for row in rows) / 3600
        found.append(f"{len(rows):,} rows in `{files}.jsonl` | {hours:.2g} |")
    others = ["what it forgets (P2) | {} rows in `p2", "{} rows in `calibrated", "{} rows in `around"]
    for what in (*others, "{} rows in `matrix_replication"):
        file = what.rpartition("`")[2]
        found.append(f"{what.format(len(read(RESULTS / f'{file}.jsonl')))}.jsonl` |")
    return found


# -- the pages


def passages() -> dict[Path, list[str]]:
    """Return each page's passages with figures that come from the rows."""
    study, guide = separate_rates()
    study += [small_tasks(), many_classes(), wrong_labels(), finished_adapters(), more_data()]
    study += several_tasks("W3: six adapters merged (TIES)", "LoRA with both")
    study += several_tasks("W5: six tasks, one after another", "LoRA with [separate rates](#correction)")
    study += [*flatness(), *corrections(), *needs_an_adapter(), *doubts()]
    column_a = read(RESULTS / "matrix_a.jsonl") + read(RESULTS / "matrix_rates.jsonl")
    column_b = read(RESULTS / "matrix_b.jsonl")
    study += [*matrix_rule.hypotheses(column_a, column_b), *matrix_rule.without_bound(column_a), *replicated()]
    guide += matrix_rule.rule(column_a)
    guide.append(matrix_rule.rule_of_b(column_b))
    guide.append(f"(`LoRASAM`: {accuracy(Runs('w2')('lora_sam')):.1f} %)")
    of_study, at_other_rates = relearned()
    study += of_study
    rows = [*cost(), *other_methods(), higher_rate(), *around()]
    rows.append(matrix_table.tables(read(RESULTS / "matrix_a.jsonl")))
    rows.append(matrix_rates.table(read(RESULTS / "matrix_rates.jsonl")))
    rows += [*replication(), matrix_b.table(column_b), at_other_rates]
    return {DOCS / "study.md": study, DOCS / "when_to_use.md": guide, RESULTS / "README.md": rows}


NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


def written(page: str, passage: str) -> str:
    """Return a page with a passage's numbers filled in at the one place where the page has its words.

    Raises:
        ValueError: no place has them, or several do.
    """
    words = NUMBER.split(passage)
    gaps = [re.sub(r"\\?\s+", r"\\s+", re.escape(part)) for part in words]
    places = list(re.finditer(NUMBER.pattern.join(gaps), page))
    if len(places) != 1:
        raise ValueError(f"{len(places)} places of the page, and not one, have the words of: {passage}")
    (place,) = places
    numbers = iter(NUMBER.findall(passage))
    return page[: place.start()] + NUMBER.sub(lambda _: next(numbers), place.group()) + page[place.end() :]


def main() -> None:
    """Write all figures into the pages."""
    for path, found in passages().items():
        page = path.read_text(encoding="utf-8")
        for passage in found:
            page = written(page, passage)
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
