"""The published figures of P1, the task that needs an adapter, are what its rows give."""

import json
import re
import runpy
import statistics
from collections import defaultdict
from pathlib import Path

from published import PUBLISHED, STUDY, figures
from scipy import stats

from recipes.shared.ledger import Ledger, Row, read
from recipes.shared.statistics import estimate, with_interval
from recipes.tune.report import answer
from recipes.tune.search import CONTROL, KEY, Search


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
    search = Search("instruction_tuning", [], space, ["0.2"], Ledger(tmp_path / "results.jsonl", KEY), 24, fresh=20)
    assert search.is_finished
    found = answer(search)
    assert found is not None
    difference = found.difference("without")
    assert difference.mean + difference.interval < 0  # which would have been "use it"
    assert found.winner == CONTROL
    assert "between 0.0157 worse and 0.00148 better than LoRA with the same other settings" in found.verdict()
