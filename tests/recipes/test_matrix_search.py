"""Column A of docs/results/protocol_matrix.md: its stages, its choice and its tables, on made-up rows."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from recipes.studies.rows import Row, read
from recipes.studies.statistics import holm

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_a
import matrix_choice as choice
import matrix_picture
import matrix_table
from matrix_choice import EFMLORA, FINAL_SEEDS, LORA, POINTS, QAT, RANDOM, SEARCH_SEEDS, SPACE, STRENGTHS, Run
from matrix_disturbances import BASE_NOISE, CLEAN
from shared_runs import open_runs


def test_all_arms_have_the_same_settings_spread_over_all_values() -> None:
    runs = choice.searched()
    of_arm = {arm: [run for run in runs if run.arm == arm] for arm in STRENGTHS}
    assert len({run.name for run in runs}) == len(STRENGTHS) * POINTS
    assert len({str(run.settings) for run in runs}) == POINTS
    for arm, own in of_arm.items():
        assert [run.settings for run in own] == [run.settings for run in of_arm[LORA]]
        assert {run.seed for run in own} == {0}
        for name, values in SPACE.items():
            counts = Counter(run.settings[name] for run in own)
            assert counts.keys() == set(values)
            assert max(counts.values()) - min(counts.values()) <= 1
        strengths = Counter(run.strength for run in own)
        assert set(strengths) == (set(STRENGTHS[arm]) or {None})
        assert len(set(strengths.values())) == 1
    # The same relative place in each arm's grid.
    places = [[STRENGTHS[arm].index(run.strength) for run in of_arm[arm]] for arm in (EFMLORA, RANDOM)]
    assert places[0] == places[1]


Losses = Callable[[Run, str], float]


def row_of(run: Run, losses: Losses) -> Row:
    part = "test" if run.stage == "final" else "validation"
    found = {
        each: {"loss": losses(run, each), "calibrated": losses(run, each), "accuracy": 0.5} for each in run.disturbances
    }
    return {**run.key(), part: found}


def study(losses: Losses) -> list[Row]:
    """Do the open runs, starting with the last one, until none is left."""
    rows: dict[str, Row] = {}
    while runs := open_runs(list(rows.values()), lambda run: run.name in rows, choice.STAGES):
        assert runs[-1].name not in rows
        rows[runs[-1].name] = row_of(runs[-1], losses)
        for run in runs[:-1:2]:  # only every second of the other runs
            rows[run.name] = row_of(run, losses)
    return list(rows.values())


def smooth(run: Run, disturbance: str) -> float:
    """LoRA's best clean loss is 2; a strength of 3 is best; the lowest disturbed losses are at high clean ones."""
    place = run.settings["rank"] + 10 * run.settings["dropout"] + 100 * run.settings["rate"]  # 2 to 41.4
    away = abs(math.log(run.strength / 3)) if run.strength else 0.0
    noise = 0.001 * math.sin((1 + len(run.arm)) * run.seed + 10 * place + 3 * len(disturbance))
    if disturbance == CLEAN:
        return 2 + 0.01 * place + 0.002 * away + noise
    return 3 - 0.01 * place + 0.5 * away + noise


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return study(smooth)


def test_the_best_within_the_bound_are_repeated_and_the_mean_chooses(rows: list[Row]) -> None:
    settings = choice.settings_of(rows)
    for arm in STRENGTHS:
        own = [each for each in settings if each.run.arm == arm]
        lowest = min(each.losses[CLEAN][0] for each in settings if each.run.arm == LORA)
        within = [each for each in own if each.losses[CLEAN][0] <= lowest + 0.1]
        assert 8 < len(within) < len(own)
        best = sorted(within, key=lambda each: each.losses[BASE_NOISE][0])[:8]
        assert all(each.losses[BASE_NOISE].keys() == set(SEARCH_SEEDS) for each in best)
        found = choice.chosen(settings, arm, BASE_NOISE)
        assert found in best
        repeats = [each for each in settings if each.run.arm == LORA and len(each.losses[CLEAN]) == 3]
        highest = min(np.mean(list(each.losses[CLEAN].values())) for each in repeats) + 0.1
        means = {}
        for each in best:
            if np.mean(list(each.losses[CLEAN].values())) <= highest:
                means[each.run.name] = np.mean(list(each.losses[BASE_NOISE].values()))
        assert found is not None
        assert found.run.name == min(means, key=lambda name: means[name])
        free = choice.chosen_freely(settings, arm, BASE_NOISE)
        assert free.losses[CLEAN][0] > lowest + 0.1
        assert free.losses[BASE_NOISE][0] < min(each.losses[BASE_NOISE][0] for each in within)


def test_no_setting_within_the_bound_is_no_choice() -> None:
    def losses(run: Run, disturbance: str) -> float:
        return smooth(run, disturbance) + (run.arm == RANDOM)

    found = study(losses)
    assert choice.chosen(choice.settings_of(found), RANDOM, BASE_NOISE) is None
    shown = matrix_table.tables(found)
    assert f"| {BASE_NOISE} | RandomPerturbation | none within the bound | 1 |" in shown  # p of the hypothesis


def test_the_eight_are_filled_up_by_the_clean_loss(rows: list[Row]) -> None:
    settings = choice.settings_of(rows)
    lowest = min(each.losses[CLEAN][0] for each in settings if each.run.arm == LORA)
    few = [each for each in settings if each.run.arm != EFMLORA]
    of_arm = sorted((each for each in settings if each.run.arm == EFMLORA), key=lambda each: each.losses[CLEAN][0])
    within = [each for each in of_arm if each.losses[CLEAN][0] <= lowest + 0.1][:3]
    without = [each for each in of_arm if each.losses[CLEAN][0] > lowest + 0.1]
    best = choice.ranked([*few, *without, *within], EFMLORA, BASE_NOISE)
    assert best[:3] == sorted(within, key=lambda each: each.losses[BASE_NOISE][0])
    assert best[3:] == without


def test_the_bound_counts_in_the_mean_too(rows: list[Row]) -> None:
    first = choice.chosen(choice.settings_of(rows), EFMLORA, BASE_NOISE)
    assert first is not None
    worse = []
    for row in rows:
        is_first = Run(row["arm"], row["settings"], row["strength"], 0).name == first.run.name
        if is_first and row["seed"] == 2:
            clean = {"loss": row["validation"][CLEAN]["loss"] + 1, "accuracy": 0.5}
            row = {**row, "validation": {**row["validation"], CLEAN: clean}}
        worse.append(row)
    found = choice.chosen(choice.settings_of(worse), EFMLORA, BASE_NOISE)
    assert found is not None
    assert found.run.name != first.run.name
    same = choice.chosen(choice.settings_of(worse), EFMLORA, BASE_NOISE, seeds=(0, 1, 1))
    assert same is not None
    assert same.run.name == first.run.name


def test_grids_are_extended_until_the_best_lies_within(rows: list[Row]) -> None:
    tried = {arm: {row["strength"] for row in rows if row["arm"] == arm} for arm in STRENGTHS}
    assert tried[EFMLORA] == {0.5, *STRENGTHS[EFMLORA]}  # 2 is best, and 0.5 is not
    assert tried[RANDOM] == {12, *STRENGTHS[RANDOM]}
    assert tried[QAT] == set(STRENGTHS[QAT])
    assert tried[LORA] == {None}
    beyond = [row for row in rows if row["arm"] == RANDOM and row["strength"] == 12 and row["seed"] == 0]
    points = {str(row["settings"]) for row in beyond}
    assert len(points) == len(beyond)
    assert 8 <= len(beyond) <= 16  # for two disturbances


def test_bits_are_extended_upwards_only() -> None:
    for best, expected in ((2, {2, 3, 4}), (8, {2, 3, 4, 6, 8, 10})):

        def losses(run: Run, disturbance: str, best: int = best) -> float:
            return smooth(run._replace(strength=None), disturbance) + 0.02 * abs((run.strength or best) - best)

        strengths = {run.strength for run in choice.extended(study(losses)) if run.arm == QAT} | {2, 3, 4}
        assert strengths == expected


def test_final_runs_are_those_of_all_choices(rows: list[Row]) -> None:
    settings, finals = choice.settings_of(rows), matrix_table.finals_of(rows)
    for arm, disturbance in product(STRENGTHS, choice.DISTURBED):
        chosen = [choice.chosen(settings, arm, disturbance)]
        if arm in choice.TESTED.get(disturbance, ()):
            chosen += [choice.chosen(settings, arm, disturbance, seeds) for seeds in choice.resamplings()]
            chosen.append(choice.chosen_freely(settings, arm, disturbance))
        for each in chosen:
            assert each is not None
            own = finals[each.run.name]
            assert own.keys() == set(FINAL_SEEDS)
            assert {CLEAN, disturbance} <= own[100]["test"].keys()
    assert "| base, noise 0.3 | LoRA | 2" not in matrix_table.tables(rows)  # LoRA has no strength


def test_the_picture_has_the_tables_differences(rows: list[Row]) -> None:
    settings, finals = choice.settings_of(rows), matrix_table.finals_of(rows)
    cells = matrix_picture.cells_of_a(rows)
    assert cells.keys() == set(product(choice.DISTURBED, STRENGTHS.keys() - {LORA}))
    own, of_lora = (choice.chosen(settings, arm, BASE_NOISE) for arm in (RANDOM, LORA))
    assert own is not None
    assert of_lora is not None
    assert cells[BASE_NOISE, RANDOM] == matrix_table.difference(finals, own, of_lora, BASE_NOISE)


def test_the_interval_covers_the_choice() -> None:
    """Two settings of one arm; which one is chosen depends on the search seeds."""

    def losses(run: Run, disturbance: str) -> float:
        if run.arm != RANDOM or disturbance == CLEAN:
            return 2.0 + (disturbance != CLEAN and run.settings != points[0])
        if run.stage == "final":
            return 1.5 if run.settings == points[0] else 2.5
        if run.settings in points[:2] and run.strength == 1:
            is_first = run.settings == points[0]
            return 1.0 + (0.1 * run.seed if is_first else 0.15)
        return 3.0

    points = [run.settings for run in choice.searched() if run.arm == RANDOM and run.strength == 1]
    rows = study(losses)
    settings, finals = choice.settings_of(rows), matrix_table.finals_of(rows)
    draws = [choice.chosen(settings, RANDOM, BASE_NOISE, seeds) for seeds in choice.resamplings()]
    share = np.mean([each is not None and each.run.settings == points[1] for each in draws])
    assert share == pytest.approx(np.mean([sum(seeds) * 0.1 / 3 > 0.15 for seeds in choice.resamplings()]))
    own = choice.chosen(settings, RANDOM, BASE_NOISE)
    of_lora = choice.chosen(settings, LORA, BASE_NOISE)
    assert own is not None
    assert of_lora is not None
    assert own.run.settings == of_lora.run.settings == points[0]
    found = matrix_table.difference(finals, own, of_lora, BASE_NOISE)
    assert (found.mean, found.interval) == (-0.5, 0.0)
    assert matrix_table.covering(settings, finals, RANDOM, BASE_NOISE) == (-0.5, 0.5)


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_the_same_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = choice.searched()[:3]
    done: list[Run] = []

    def perform(run: Run) -> Row:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return {"value": 2.0, "validation": {CLEAN: {"loss": 2.0, "accuracy": 0.5}}}

    def stage(rows: list[Row]) -> list[Run]:
        assert len(rows) == len(done)
        return runs

    monkeypatch.setattr(matrix_a, "STAGES", (stage,))
    monkeypatch.setattr(matrix_a, "perform", perform)
    monkeypatch.setattr(matrix_a, "tables", lambda rows: f"{len(rows)} rows")
    with pytest.raises(KeyboardInterrupt):
        matrix_a.main(tmp_path)
    assert len(read(tmp_path / "results.jsonl")) == 2
    monkeypatch.setattr(matrix_a, "perform", lambda run: done.append(run) or {"value": 2.0, "validation": {}})
    matrix_a.main(tmp_path)
    assert [run.name for run in done] == [run.name for run in runs]
    rows = read(tmp_path / "results.jsonl")
    assert [(row["arm"], row["strength"], row["seed"], row["stage"]) for row in rows] == [
        (run.arm, run.strength, 0, "search") for run in runs
    ]
    assert (tmp_path / "table.md").read_text() == "3 rows"
