"""Column B of docs/results/protocol_matrix.md: its stages, its choice and its tables, on made-up rows."""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.studies.rows import Row, read
from recipes.studies.statistics import holm

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_b
import matrix_picture
import matrix_rule
from matrix_facts import Knowledge
from matrix_rule import RELEARNING
from matrix_table import finals_of
from matrix_unlearning import FMLORA, LORA, RANDOM, SPACE, Run
from shared_runs import open_runs

Recall = Callable[[Run], float]


def row_of(run: Run, recalled: Recall) -> Row:
    """Utility falls with the rate, and only the highest rate leaves too little of it."""
    utility = 1 - 20 * run.settings["rate"]
    recall = {steps: recalled(run) for steps in ("0", "5", "10", "30")}
    likelihood = -0.1 * (run.seed % 3) * len(run.arm) if run.stage == "final" else 0.0
    others = {"likelihood": {"30": likelihood}, "shown": 1.0, "utility": utility, "rise": 0.1}
    return {**run.key(), "recall": recall, **others}


def study(recalled: Recall) -> list[Row]:
    """Do the open runs, starting with the last one, until none is left."""
    rows: dict[str, Row] = {}
    while runs := open_runs(list(rows.values()), lambda run: run.name in rows, matrix_b.STAGES):
        assert runs[-1].name not in rows
        for run in [runs[-1], *runs[:-1:2]]:
            rows[run.name] = row_of(run, recalled)
    return list(rows.values())


def smooth(run: Run) -> float:
    """A strength of 4 is best, and a high rate."""
    away = abs(math.log(run.strength / 4)) if run.strength else 1.0
    noise = 0.001 * math.sin((1 + len(run.arm)) * run.seed + 1000 * run.settings["rate"] + run.settings["steps"])
    return 0.5 + 0.1 * away - 100 * run.settings["rate"] + noise


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return study(smooth)


def test_all_settings_differ_and_all_arms_share_them() -> None:
    runs = matrix_b.searched()
    assert len({run.name for run in runs}) == len(runs) == 3 * matrix_b.POINTS
    shared = defaultdict(set)
    for run in runs:
        shared[run.arm].add(json.dumps(run.settings))
    assert shared[LORA] == shared[FMLORA] == shared[RANDOM]


def test_a_choice_keeps_its_utility(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    for arm in (LORA, FMLORA, RANDOM):
        choice = matrix_b.chosen(settings, arm)
        assert choice.utility((0,)) >= 0.95
        assert choice.run.settings["rate"] == 1e-3  # 3e-3 would leave 0.94
    assert matrix_b.chosen(settings, FMLORA).run.strength == 4


def test_grids_are_extended_until_the_best_lies_within(rows: list[Row]) -> None:
    """That of the noise ends at 1."""
    strengths = {row["strength"] for row in rows if row["arm"] == RANDOM}
    assert strengths == {0.03, 0.1, 0.3, 1, 4, 16}
    for beyond in (4, 16):
        runs = [row for row in rows if (row["arm"], row["strength"], row["seed"]) == (RANDOM, beyond, 0)]
        for name in matrix_b.BEYOND:  # these are extended, too
            runs = [row for row in runs if row["settings"][name] in SPACE[name]]
        assert len({json.dumps(row["settings"]) for row in runs}) == len(runs) == 4


def test_strengths_are_extended_twice_at_most() -> None:
    found = study(lambda run: 0.5 - 0.01 * math.log(run.strength or 1))
    assert {row["strength"] for row in found if row["arm"] == FMLORA} == {0.06, 0.25, 1, 4, 16, 64}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("rate", {3e-5, 1e-4}, set()),  # the highest one leaves too little utility
        ("steps", {12}, set()),
        ("beta", {0.02}, {2.5}),
        ("retain", {0.3}, {30}),
    ],
)
def test_other_grids_are_extended_for_every_arm(name: str, low: set[float], high: set[float]) -> None:
    """To the end at which the best setting lies."""
    values = matrix_b.BEYOND[name]
    for sign, beyond in ((1, low), (-1, high)):

        def recalled(run: Run, sign: int = sign) -> float:
            return 0.01 * sign * values.index(run.settings[name])

        found = study(recalled)
        for arm in matrix_b.STRENGTHS:
            rows = [row for row in found if row["arm"] == arm and row["seed"] == 0 and row["stage"] == "search"]
            assert {row["settings"][name] for row in rows} == {*SPACE[name], *beyond}


def test_final_runs_are_on_fresh_seeds_and_the_table_has_all_arms(rows: list[Row]) -> None:
    finals = [dict(row) for row in rows if row["stage"] == "final"]
    assert {row["seed"] for row in finals} == set(range(100, 120))
    text = matrix_b.table(rows)
    assert all(f"| {arm} |" in text for arm in (LORA, FMLORA, RANDOM))
    cells = matrix_picture.cells_of_b(rows)
    assert [method for _, method in cells] == [FMLORA, RANDOM]
    for arm, found in zip((FMLORA, RANDOM), cells.values(), strict=True):
        assert found is not None
        assert f"| {arm} | {found.mean:+.3f}" in text
    for row in finals:
        row["rise"] = math.nan  # one that has diverged
    assert "| nan ± nan |" in matrix_b.table(finals + [row for row in rows if row["stage"] == "search"])


def test_the_pages_have_the_recalls_and_holms_p_of_all_four(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chosen", "compared"):
        monkeypatch.setattr(matrix_rule, name, lambda *args: None)  # column A has no rows
    first, second, *of_b = matrix_rule.hypotheses([], rows)
    assert first.startswith("| A1: noise on the base, as large as its norm, RandomPerturbation |")
    assert second.endswith("|  | none within the bound |  | 1 |  |")
    settings, finals = matrix_b.settings_of(rows), finals_of(rows)
    found = {arm: matrix_b.compared(settings, finals, arm) for arm in (FMLORA, RANDOM)}
    p_values = [each.p for each in found.values() if each]
    for line, (arm, each), p in zip(of_b, found.items(), holm([1.0, 1.0, *p_values])[2:], strict=True):
        assert each is not None
        assert each.covering is not None
        low, high = each.covering
        assert (
            f"{RELEARNING}, {arm} | {each.means[0]:.2f} | {each.means[1]:.2f} | {each.difference.mean:+.2f} [" in line
        )
        assert line.endswith(f"] | [{low:+.2f}, {high:+.2f}] | {p:.2g} |  |")
    unfinished = [row for row in rows if row["stage"] == "search"]
    unfinished += [{**run.key(), **row_of(run, smooth)} for run in matrix_b.final(rows)]
    assert "]  |  |" not in matrix_rule.hypotheses([], rows)[2]
    assert "] |  |" in matrix_rule.hypotheses([], unfinished)[2]  # intervals that cover the search have no runs


def test_the_rule_takes_the_useful_arm_with_the_lowest_recall(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    line = matrix_rule.rule_of_b(rows)
    assert re.match(rf"\| {RELEARNING} \| RandomPerturbation \| LoRA: 0\.50 recalled \| \S* \(sigma 4\): -0\.10", line)
    damaged = [{**row, "utility": row["utility"] - 0.1 * (row["arm"] == RANDOM)} for row in rows if row["seed"] > 99]
    searched = [row for row in rows if row["seed"] < 99]
    assert f"| {RELEARNING} | LoRA |" in matrix_rule.rule_of_b(searched + damaged)
    monkeypatch.setattr(matrix_rule, "WORTH_B", 0.2)
    assert f"| {RELEARNING} | LoRA |" in matrix_rule.rule_of_b(rows)


def test_an_arm_without_enough_utility_takes_what_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_b, "LEAST_UTILITY", 0.9999)
    rows = study(smooth)
    assert matrix_b.chosen(matrix_b.settings_of(rows), FMLORA).run.settings["rate"] == 3e-5
    assert set(matrix_picture.cells_of_b(rows).values()) == {None}
    with pytest.raises(ValueError, match="enough utility"):
        matrix_rule.rule_of_b(rows)


def test_without_a_useful_perturbation_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_b.Setting, "is_useful", lambda self, seeds: self.run.arm == LORA)
    line = matrix_rule.rule_of_b(study(smooth))
    assert re.match(rf"\| {RELEARNING} \| LoRA \| LoRA: -0\.40 recalled \| none with enough utility \|", line)


def test_a_choice_that_loses_its_utility_on_other_seeds_is_the_most_useful(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    for each in matrix_b.ranked(settings, FMLORA)[:8]:
        for seed in (1, 2):
            each.rows[seed] = {**each.rows[seed], "utility": 0.5}
    last = matrix_b.ranked(settings, FMLORA)[7]
    last.rows[2]["utility"] = 0.9
    assert matrix_b.chosen(settings, FMLORA) == last
    assert not last.is_useful(matrix_b.SEARCH_SEEDS)


def test_the_settings_that_miss_the_bounds_least_come_next(rows: list[Row]) -> None:
    settings = matrix_b.settings_of([dict(row) for row in rows if row["stage"] == "search"])
    own = [each for each in settings if each.run.arm == LORA]
    measured = {(0.99, 1.34): 3, (0.944, 0.1): 1, (0.94, 0.3): 2, (1.0, math.nan): 4, (0.95, 0.3): 0}
    for each, (utility, rise) in zip(own, measured, strict=False):
        each.rows[0] |= {"utility": utility, "rise": rise}
    order = matrix_b.ranked(own[:5], LORA)
    assert [measured[each.rows[0]["utility"], each.rows[0]["rise"]] for each in order[:4]] == [0, 1, 2, 3]


def test_equal_recalls_are_ordered_by_likelihood() -> None:
    rows = [
        {**row_of(run, lambda run: 0.5), "likelihood": {"30": -run.settings["rank"]}} for run in matrix_b.searched()
    ]
    order = [each for each in matrix_b.ranked(matrix_b.settings_of(rows), LORA) if each.is_useful((0,))]
    ranks = [each.run.settings["rank"] for each in order]
    assert len(set(ranks)) == 3
    assert ranks == sorted(ranks, reverse=True)


def test_a_resampling_without_a_useful_setting_takes_the_choice_of_all_seeds(rows: list[Row]) -> None:
    settings = matrix_b.settings_of([dict(row) for row in rows if row["stage"] == "search"])
    choice = matrix_b.chosen(settings, LORA)
    for each in matrix_b.ranked(settings, LORA)[:8]:
        each.rows[2] |= {"utility": 0.94}
    every = dict(zip(matrix_b.resamplings(), matrix_b.choices(settings, LORA), strict=True))
    assert every[2, 2, 2] == matrix_b.chosen(settings, LORA)
    assert every[0, 0, 0].run == choice.run


def test_equal_recalls_have_p_1(rows: list[Row]) -> None:
    finals = finals_of([{**row, "recall": {"30": 0.0}} for row in rows])
    found = matrix_b.compared(matrix_b.settings_of(rows), finals, FMLORA)
    assert found is not None
    assert (found.difference.mean, found.p) == (0.0, 1.0)


def test_a_model_that_is_damaged_elsewhere_is_not_useful(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    first = matrix_b.chosen(settings, RANDOM)
    first.rows[0] = {**first.rows[0], "rise": 0.8}
    assert not first.is_useful((0,))
    assert first not in matrix_b.ranked(settings, RANDOM)[:8]
    assert matrix_b.chosen(settings, RANDOM, (0,)) != first
    first.rows[0]["rise"] = math.nan
    assert not first.is_useful((0,))


def test_the_command_does_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four settings of each arm, hardly any extensions, and two final seeds."""
    monkeypatch.setattr(matrix_b, "POINTS", 4)
    monkeypatch.setattr(matrix_b, "BEYOND", {})
    monkeypatch.setattr(matrix_b, "BEST", 2)
    monkeypatch.setattr(matrix_b, "FINAL_SEEDS", range(100, 102))
    monkeypatch.setattr(matrix_b, "Knowledge", lambda file: SimpleNamespace(digest="0"))
    done: list[Run] = []

    def perform(run: Run, knowledge: Knowledge) -> Row:
        done.append(run)
        return {**row_of(run, smooth), "value": smooth(run), "taught": knowledge.digest}

    monkeypatch.setattr(matrix_b, "perform", perform)
    matrix_b.main(tmp_path)
    file = tmp_path / "results.jsonl"
    rows = read(file)
    assert {row["stage"] for row in rows} == {"search", "final"}
    assert (tmp_path / "table.md").read_text() == matrix_b.table(rows)

    # Another machine does what is left, and has the same model.
    every, so_far = list(done), tmp_path / "so_far.jsonl"
    done.clear()
    so_far.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-3]))
    matrix_b.main(tmp_path / "other", so_far)
    assert [run.name for run in done] == [run.name for run in every[-3:]]
    assert read(tmp_path / "other" / "results.jsonl") == rows
    monkeypatch.setattr(matrix_b, "Knowledge", lambda file: SimpleNamespace(digest="1"))
    with pytest.raises(ValueError, match="Final runs had another model"):
        matrix_b.main(tmp_path / "different", so_far)
    so_far.write_text("".join(f"{line}\n" for line in file.read_text().splitlines() if '"search"' in line))
    done.clear()
    matrix_b.main(tmp_path / "searched", so_far)  # the search may have had another model
    assert {run.stage for run in done} == {"final"}
    with pytest.raises(ValueError, match=r"none\.jsonl has no rows of finished runs"):
        matrix_b.main(tmp_path / "none", tmp_path / "none.jsonl")
