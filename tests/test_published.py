"""The published figures are what the published rows give, one by one.

A change of the rows, of a figure or of a statistic would show.
"""

import json
import math
import re
import runpy
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from recipes.reproduce.__main__ import main as reproduce
from recipes.shared.ledger import Row, read
from recipes.shared.statistics import Estimate, estimate, with_interval
from recipes.studies.results import Results
from recipes.tune.report import answer
from recipes.tune.search import CONTROL, KEY, Search

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = DOCS / "results"
STUDY = (DOCS / "study.md").read_text(encoding="utf-8")

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


def figures(text: str) -> list[str]:
    """All numbers of a text, in order."""
    return re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", re.sub(r"(\d),(?!\d{3})", r"\1 ,", text))


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


def test_the_task_that_needs_an_adapter() -> None:
    """P1, its control, and P2: what the protocol tests, and what the study says."""
    arms: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for file in ("p1", "p1_control", "p2"):
        for row in read(PUBLISHED / f"{file}.jsonl"):
            if row["stage"] == "final":
                rank = row["config"]["model.lora.r/model.lora.lora_alpha"].partition("/")[0]
                name = "efmlora" if row["side"] == "with" else f"rank_{rank}"
                found = arms[name].setdefault(row["seed"], {})
                found |= {"rise": row["rise"]} if file == "p2" else row["tested"]
    seeds = set(range(100, 120))
    assert {name: set(found) for name, found in arms.items()} == dict.fromkeys(("efmlora", "rank_8", "rank_32"), seeds)

    table = STUDY.split("| On 20 fresh seeds |")[1].split("\n\n")[0].splitlines()[2:]
    measures = {"test_loss": (3, 1), "test_accuracy": (1, 100), "rise": (2, 1)}
    p_values = []
    for line, (measure, (digits, unit)) in zip(table, measures.items(), strict=True):
        expected = []
        for arm in ("rank_8", "rank_32", "efmlora"):
            expected.append(f"{unit * statistics.mean(found[measure] for found in arms[arm].values()):.{digits}f}")
        for arm in ("rank_8", "rank_32"):
            values = [unit * (arms["efmlora"][seed][measure] - arms[arm][seed][measure]) for seed in sorted(seeds)]
            found = estimate(values)
            expected.append(with_interval(found, digits))
            if arm == "rank_8":
                p_values.append(2 * stats.t.sf(abs(found.mean / found.error), found.values - 1))
        assert figures(line.partition("|")[2].partition("|")[2]) == figures(" ".join(expected))
    # P1's p is the larger one of the two, which Holm's method leaves as it is.
    assert p_values[2] < p_values[0]
    assert f"p {p_values[0]:.4f} by Holm's method" in STUDY


def test_other_methods_on_the_task_that_needs_an_adapter() -> None:
    """The arms beside P1, each on the seeds that its winner has."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    configs: dict[str, dict[str, str]] = {}
    for file in ("p1", "p1_control", "arms"):
        for row in read(PUBLISHED / f"{file}.jsonl"):
            if row["stage"] == "final":
                name = row.get("arm") or ("efmlora" if row["side"] == "with" else "rank_8")
                name = "rank_32" if file == "p1_control" else name
                losses[name][row["seed"]] = row["tested"]["test_loss"]
                configs[name] = row["config"]
    table = STUDY.split("| On 10 of these seeds |")[1].split("\n\n")[0].splitlines()[2:]
    names = {"Bi-LoRA": "bi_lora", "LoRA-SAM": "lora_sam", "random scaling": "scaling", "MonteCLoRA": "monteclora"}
    names |= {"FMLoRA": "fmlora"}
    assert len(table) == len(names)
    for line in table:
        _, title, settings, found = line.split("|", 3)
        name = names[title.strip()]
        config, of_arm = configs[name], losses[name]
        assert set(of_arm) == set(range(100, 110))
        rank = config["model.lora.r/model.lora.lora_alpha"].partition("/")[0]
        chosen = [rank, config["model.lora.lora_dropout"], config["model.learning_rate"], config["rho"]]
        assert settings.strip() == "rank {}, dropout {}, rate {}, strength {}".format(*chosen)
        expected = [f"{statistics.mean(of_arm.values()):.3f}"]
        for other in ("efmlora", "rank_32"):
            expected.append(with_interval(estimate([losses[other][seed] - value for seed, value in of_arm.items()]), 3))
        assert figures(found) == figures(" ".join(expected))


def test_the_doubts_about_the_task_that_needs_an_adapter() -> None:
    """P1 over the search's seeds, and after temperature scaling."""
    found = runpy.run_path(str(PUBLISHED / "search_seeds.py"))["bootstrap"]()
    expected = [f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]", f"{100 * found.other:.0f} % of the draws"]
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    trials: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    temperatures = []
    for row in read(PUBLISHED / "calibrated.jsonl"):
        if row["stage"] == "search":
            trials[row["side"]][json.dumps(row["config"])] = tuple(row["validation"])
        else:
            losses[json.dumps(row["config"])][row["seed"]] = row["test"][1]
            temperatures.append(row["temperature"])
    expected.append(f"temperatures of {min(temperatures):.2f} to {max(temperatures):.2f}")
    for of_side in trials.values():
        assert len(of_side) == 12
        first_four = [sorted(of_side, key=lambda config, i=i: of_side[config][i])[:4] for i in (0, 1)]
        assert first_four[0] == first_four[1]
    (efmlora,) = [config for config in losses if '"rho": "0.2"' in config]
    for rank in ("8/16", "32/64"):
        (lora,) = [config for config in losses if rank in config and config != efmlora]
        values = [losses[efmlora][seed] - value for seed, value in losses[lora].items()]
        expected.append(with_interval(estimate(values), 3))
    text = re.sub(r"\s+", " ", STUDY)
    assert [each for each in expected if each not in text] == []


def test_the_loss_around_the_adapters_of_the_task_that_needs_one() -> None:
    arms: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in read(PUBLISHED / "around.jsonl"):
        rank = row["config"]["model.lora.r/model.lora.lora_alpha"].partition("/")[0]
        arms["efmlora" if row["side"] == "with" else f"rank_{rank}"][row["seed"]] = row
    table = STUDY.split("| Nats | LoRA, rank 8 |")[1].split("\n\n")[0].splitlines()[2:]
    for line, (measure, digits) in zip(table, {"sam": 3, "lora": 3, "expected": 3, "critical": 2}.items(), strict=True):
        expected = []
        for arm in ("rank_8", "rank_32", "efmlora"):
            assert set(arms[arm]) == set(range(103, 111))
            expected.append(f"{statistics.mean(row[measure] for row in arms[arm].values()):.{digits}f}")
        for arm, other in (("rank_32", "rank_8"), ("efmlora", "rank_32")):
            differences = [arms[arm][seed][measure] - row[measure] for seed, row in sorted(arms[other].items())]
            expected.append(with_interval(estimate(differences), digits))
        assert figures(line.partition("|")[2].partition("|")[2]) == figures(" ".join(expected))


def test_tune_does_not_take_the_ranks_gain_for_the_perturbations(tmp_path: Path) -> None:
    """P1 and its control, as `recipes.tune` would have run them."""
    rows = read(PUBLISHED / "p1.jsonl")
    rows += [{**row, "side": CONTROL} for row in read(PUBLISHED / "p1_control.jsonl")]
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    space = {name: ["any"] * 12 for name in rows[0]["config"] if name != "rho"}
    search = Search("instruction_tuning", [], space, ["0.2"], Results(tmp_path, KEY), 24, fresh=20)
    assert search.next_run() is None
    found = answer(search)
    assert found is not None
    difference = found.difference("without")
    assert difference.mean + difference.interval < 0  # which would have been "use it"
    assert found.winner == CONTROL
    assert "between 0.0157 worse and 0.00148 better than LoRA with the same other settings" in found.verdict()


def test_table_1_offline(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "table1_offline.jsonl", tmp_path / "results.jsonl")
    assert reproduce(["table1_offline", f"--folder={tmp_path}"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    page = (DOCS / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    for method in ("LoRA", "EFMLoRA", "FMLoRA"):
        (figures,) = re.findall(rf"^\| {method} \|(.*± .*)", page, re.M)
        found = re.findall(rf"^\| {method} \|(.*± .*)", table, re.M)[0]
        assert re.sub(r" \(5\)", "", found) == figures
