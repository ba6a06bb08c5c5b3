"""The published figures are what the published rows give, one by one.

A change of the rows, of a figure or of a statistic would show.
"""

import math
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from published import DOCS, PUBLISHED, STUDY, figures
from scipy import stats

from recipes.reproduce.__main__ import main as reproduce
from recipes.shared.ledger import Row, read
from recipes.shared.statistics import Estimate, estimate, with_interval

BySeed = Mapping[int, Row]


class Runs:
    """The runs of a workload of the study, on test or of its searches."""

    def __init__(self, workload: str, stage: str = "test") -> None:
        self.arms: dict[tuple[str, frozenset[tuple[str, Any]]], dict[int, Row]] = defaultdict(dict)
        for file in PUBLISHED.glob(f"evidence_{workload}*.jsonl"):
            for row in read(file):
                # Other files of a workload hold rows of other kinds.
                is_run = f"{'test' if stage == 'test' else 'validation'}_accuracy" in row
                if row.get("workload") == workload and row.get("stage") == stage and is_run:
                    self.arms[row["arm"], frozenset(row["config"].items())][row["seed"]] = row

    def __call__(self, arm: str, **config: float | None) -> BySeed:
        """The only runs of an arm with these settings; None for one that they do not have."""
        (found,) = [
            rows
            for (name, settings), rows in self.arms.items()
            if name == arm and all(dict(settings).get(entry) == value for entry, value in config.items())
        ]
        return found


def difference(one: BySeed, other: BySeed) -> Estimate:
    """In points of test accuracy, paired by seed."""
    return estimate(
        [100 * (one[seed]["test_accuracy"] - other[seed]["test_accuracy"]) for seed in one if seed in other]
    )


def accuracy(rows: BySeed) -> float:
    return 100 * statistics.mean(row["test_accuracy"] for row in rows.values())


def lines_of_the_study() -> Iterator[tuple[str, str]]:
    """The name of each row of the study's table, and the rest of it."""
    table = STUDY.split("| Situation | Seeds |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name = re.match(r"\| (W\d|)", line)[1] or "comparison"
        yield name, line.removeprefix(f"| {name}")


def small_tasks() -> list[str]:
    by_run: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in read(PUBLISHED / "comparison.jsonl"):
        if row["part"] == "test":
            by_run[row["task"], row["method"]][row["seed"]] = 100 * row["accuracy"]
    tasks = {task for task, _ in by_run}
    assert len(tasks) == 6
    shared = set.intersection(*(set(by_run[task, method]) for task, method in product(tasks, ("lora", "efmlora"))))
    means = []
    for seed in shared:
        means.append(statistics.mean(by_run[task, "efmlora"][seed] - by_run[task, "lora"][seed] for task in tasks))
    return [f"{len(shared)} {with_interval(estimate(means))}"]


def many_classes() -> list[str]:
    runs = Runs("w1")
    efmlora, lora = runs("efmlora"), runs("lora")
    row = lora[0]
    found = [difference(efmlora, lora), difference(efmlora, runs("linear_probe"))]
    classes, shots = round(1 / row["chance"]), row["settings"]["shots"]
    return [
        f"{classes} {shots} {found[0].values} {with_interval(found[0])} {with_interval(found[1])} "
        f"{row['config']['dropout']}"
    ]


def against_a_small_adapter(efmlora: BySeed, lora: BySeed, probe: BySeed, small: BySeed) -> str:
    found = [difference(efmlora, other) for other in (lora, probe, small)]
    assert len({each.values for each in found}) == 1
    config = small[0]["config"]
    seeds, cells = found[0].values, [with_interval(each) for each in found]
    return f"{seeds} {cells[0]} {cells[1]} {config['rank']} {config['dropout']} {cells[2]}"


def wrong_labels() -> list[str]:
    runs = Runs("w2")
    lora = runs("lora", dropout=0.9)
    cells = against_a_small_adapter(runs("efmlora"), lora, runs("linear_probe"), runs("rank_2", dropout=0.9))
    return [f"{100 * lora[0]['settings']['noise']:g} {cells}"]


def more_data() -> list[str]:
    runs, searched = Runs("w6"), Runs("w6", "search")
    # rho 0 is LoRA without regularization, whose rows both searches share.
    trials = {}
    for (arm, settings), rows in searched.arms.items():
        if arm == "efmlora" or set(dict(settings)) == {"learning_rate"}:
            trials[settings] = statistics.mean(row["validation_loss"] for row in rows.values())
    chosen = dict(min(trials, key=lambda settings: trials[settings]))
    assert set(chosen) == {"learning_rate"}
    efmlora, lora = runs("lora", dropout=None, **chosen), runs("lora", dropout=0.3)
    found = [difference(efmlora, lora), difference(efmlora, runs("linear_probe"))]
    shots = lora[0]["settings"]["shots"]
    return [f"{shots:,} {found[0].values} {with_interval(found[0])} {with_interval(found[1])} 0"]


def with_both(runs: Runs) -> str:
    efmlora, lora = runs("efmlora_on_dropout"), runs("efmlora_on_dropout_rho_0")
    assert lora[0]["config"]["rho"] == 0
    found = [difference(efmlora, other) for other in (lora, runs("linear_probe"))]
    config, its_config = efmlora[0]["config"], lora[0]["config"]
    assert (config["rank"], config["dropout"]) == (its_config["rank"], its_config["dropout"])
    seeds = found[0].values
    return f"{config['rank']} {config['dropout']} {seeds} {with_interval(found[0])} {with_interval(found[1])}"


def several_tasks(workload: str) -> list[str]:
    runs = Runs(workload)
    lora, small = runs("lora", dropout=0.3), runs("rank_2_more_dropout")
    assert len(lora[0]["settings"]["tasks"]) == 6
    return [against_a_small_adapter(runs("efmlora"), lora, runs("linear_probe"), small), with_both(runs)]


def finished_adapters() -> list[str]:
    found = []
    for workload in ("w1", "w2", "w3", "w5"):
        judged: dict[str, dict[int, Row]] = defaultdict(dict)
        for row in read(PUBLISHED / f"evidence_{workload}_robustness.jsonl"):
            judged[row["arm"]][row["seed"]] = row["conditions"]

        def loss(arm: str, seed: int, condition: str, judged: Mapping[str, Mapping[int, Row]] = judged) -> float:
            under = judged[arm][seed]
            return under["as_trained"]["accuracy"] - under[condition]["accuracy"]

        for condition in set(judged["lora"][0]) - {"as_trained"}:
            found.append(
                estimate([loss("lora", seed, condition) - loss("efmlora", seed, condition) for seed in judged["lora"]])
            )
    seeds = {each.values for each in found}
    above, below = (sum(sign * each.mean > each.interval for each in found) for sign in (1, -1))
    assert len(seeds) == 1
    return [f"{len(found)} {seeds.pop()} {above} 0 {below}"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W1", many_classes),
        ("W2", wrong_labels),
        ("W3", lambda: several_tasks("w3")),
        ("W4", finished_adapters),
        ("W5", lambda: several_tasks("w5")),
        ("W6", more_data),
    ],
)
def test_the_study(name: str, expected: Callable[[], list[str]]) -> None:
    """Every number of the table; the code that made the rows is archived."""
    shown = [figures(cells) for found, cells in lines_of_the_study() if found == name]
    assert shown == [figures(line) for line in expected()]


def test_the_comparison() -> None:
    """Its row in the study's table, of which no other row is left to check."""
    lines = list(lines_of_the_study())
    assert {name for name, _ in lines} == {"comparison", "W1", "W2", "W3", "W4", "W5", "W6"}
    assert [figures(cells) for name, cells in lines if name == "comparison"] == [figures(*small_tasks())]


def test_the_text_of_the_study() -> None:
    """What it says about flatness and corrections; the audit's own figures have no rows."""
    text = re.sub(r"\s+", " ", STUDY)

    flatness: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in read(PUBLISHED / "evidence_w1_flatness.jsonl"):
        flatness[row["arm"]][row["seed"]] = row["validation"]

    def ratio(base: str, measure: str, part: str) -> str:
        pairs = [(flatness["efmlora"][seed], flatness[base][seed]) for seed in flatness[base]]
        logs = estimate([math.log(one[measure][part] / other[measure][part]) for one, other in pairs])
        low, mean, high = (math.exp(logs.mean + sign * logs.interval) for sign in (-1, 0, 1))
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]"

    runs = {name: Runs(name) for name in ("w1", "w2", "w3", "w5")}
    expected = [
        f"its slope is {ratio('lora', 'gradient', 'B')} of tuned LoRA's, its curvature (trace of the Hessian) "
        f"{ratio('lora', 'trace', 'B')}.",
        f"their slope is {ratio('lora', 'gradient', 'full')} of LoRA's, their curvature "
        f"{ratio('lora', 'trace', 'full')}.",
        f"with dropout 0.3, is {with_interval(difference(runs['w2']('efmlora'), runs['w2']('lora', dropout=0.3)))}.",
        f"EFMLoRA {accuracy(runs['w3']('efmlora')):.2f}, "
        f"and the LoRA of the table {accuracy(runs['w3']('lora', dropout=0.3)):.1f}.",
    ]

    p_values = []
    for name, lora in (("w1", {}), ("w2", {"dropout": 0.9}), ("w3", {"dropout": 0.3})):
        found = difference(runs[name]("efmlora"), runs[name]("lora", **lora))
        p_values.append(2 * stats.t.sf(abs(found.mean / found.error), found.values - 1))
    of_h2 = p_values[1]
    assert sorted(p_values).index(of_h2) == 1  # so that Holm's method multiplies it by two
    expected.append(f"p is {2 * of_h2:.3f} by Holm's method")

    moved = []
    for name, rate in (("w1", 5e-4), ("w2", 5e-4), ("w3", 5e-4), ("w5", 2.5e-4), ("w6", 1e-3)):
        arms = Runs(name, "search").arms
        losses = [
            statistics.mean(row["validation_loss"] for row in arms["lora", frozenset(config.items())].values())
            for config in ({"learning_rate": rate}, {"learning_rate": rate, "weight_decay": 0.1})
        ]
        moved.append(abs(losses[1] - losses[0]))
    assert max(moved) <= 0.003
    expected.append("moved the validation loss by 0.003 nats at most")

    assert [each for each in expected if each not in text] == []


def test_the_rows_and_hours_of_the_study() -> None:
    page = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    expected = []
    for files in ("evidence_*", "comparison", "head_rate", "radius_tasks", "p1", "p1_control", "arms"):
        rows = [row for file in PUBLISHED.glob(f"{files}.jsonl") for row in read(file)]
        # What was only judged has no processor time in its row.
        hours = sum(row.get("processor_seconds", row["seconds"]) for row in rows) / 3600
        expected.append(f"{len(rows):,} rows in `{files}.jsonl` | {hours:.2g} |")
    for file in ("p2", "calibrated", "around"):
        expected.append(f"{len(read(PUBLISHED / f'{file}.jsonl'))} rows in `{file}.jsonl` |")
    assert [each for each in expected if each not in page] == []


def test_the_separate_rates_of_the_study() -> None:
    searched: dict[float, list[float]] = defaultdict(list)
    arms: dict[tuple[int | None, float | None], dict[int, Row]] = defaultdict(dict)
    for row in read(PUBLISHED / "head_rate.jsonl"):
        config = row["config"]
        if row["stage"] == "search":
            searched[config["rho"]].append(row["validation_loss_scaled"])
        else:
            arms[config.get("rank"), config.get("rho")][row["seed"]] = row
    losses = {rho: statistics.mean(values) for rho, values in searched.items()}
    rho = min(losses, key=lambda each: losses[each])
    small, plain, efmlora = arms[2, None], arms[None, None], arms[2, rho]
    assert small.keys() == plain.keys() == efmlora.keys()
    runs = Runs("w5")
    one_rate = {seed: row for seed, row in runs("efmlora_on_dropout").items() if seed in small}
    probe = {seed: row for seed, row in runs("linear_probe").items() if seed in small}
    expected = [
        f"{len(small)} seeds: LoRA of rank 2 with dropout 0.9 (head 4e-3, adapter 1e-4) has {accuracy(small):.2f}",
        f"(head 2e-3, adapter 1e-4) {accuracy(plain):.2f}",
        f"one rate has {accuracy(one_rate):.2f}, which is {with_interval(difference(one_rate, small))} against",
        f"the probe {accuracy(probe):.2f}.",
        f"with the rho of {rho:g} that validation chose",
        f"it has {accuracy(efmlora):.2f}, a difference of {with_interval(difference(efmlora, small))}.",
    ]
    text = re.sub(r"\s+", " ", STUDY)
    assert [each for each in expected if each not in text] == []
    guide = re.sub(r"\s+", " ", (DOCS / "when_to_use.md").read_text(encoding="utf-8"))
    assert f"{accuracy(small):.1f} %; EFMLoRA with these {accuracy(efmlora):.1f} % ({len(small)} seeds)" in guide


def test_table_1_offline(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "table1_offline.jsonl", tmp_path / "results.jsonl")
    assert reproduce(["table1_offline", f"--folder={tmp_path}"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    page = (DOCS / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    for method in ("LoRA", "EFMLoRA", "FMLoRA"):
        (figures,) = re.findall(rf"^\| {method} \|(.*± .*)", page, re.M)
        found = re.findall(rf"^\| {method} \|(.*± .*)", table, re.M)[0]
        assert re.sub(r" \(5\)", "", found) == figures
