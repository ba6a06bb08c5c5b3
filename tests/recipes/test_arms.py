"""The arms beside P1 in docs/results/arms.py."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Classifier, fit

from lightning_flatlora import EFMLoRA
from recipes.studies.rows import Row, read
from recipes.tune.search import Run
from recipes.tune.space import Config

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import arms
import p1_rate
from p2 import run_of


def test_turned_perturbations_point_down(tmp_path: Path) -> None:
    """After the first step, whose gradient is plain LoRA's in both."""
    found = []
    for callback in (EFMLoRA(0.5), arms.Turned(0.5)):
        fit(tmp_path, Classifier(), [callback], max_steps=1)
        found.append(callback.state_dict()["perturbation"]["E"])
    up, down = found
    assert up.keys() == down.keys()
    for name, E in up.items():
        assert E.any()
        assert torch.equal(down[name], -E)


@pytest.mark.parametrize("name", sorted(arms.ARMS))
def test_each_arm_has_options_of_its_strength(name: str) -> None:
    arm = arms.ARMS[name]
    given = [tuple(arm.options(strength, 0)) for strength in arm.strengths]
    assert len(set(given)) == len(given) == 4


class Done:
    """Stands in for a queue: the rows of the runs that are done."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.by_name = {run_of(row).name: row for row in rows}

    def find(self, run: Run) -> Row | None:
        return self.by_name.get(run.name)

    def add(self, run: Run, value: float) -> None:
        self.by_name[run.name] = row = {**run.key(), "value": value, "mode": "min"}
        self.rows.append(row)


def without_a_perturbation(name: str) -> list[Row]:
    """P1's rows, with which each arm begins."""
    return [row for row in arms.published(name) if row["side"] == "without"]


def searched(name: str, folder: Path, best: float) -> tuple[list[Row], list[Run]]:
    """Do an arm's search where the loss depends on the distance to the best strength; return its rows and new runs."""
    queue: Any = Done(without_a_perturbation(name))
    search, new = arms.search_of(name, queue, folder), []
    while runs := search.open_runs():
        run = runs[-1]
        new.append(run)
        queue.add(run, abs(math.log(arms.strength_of(run.config) / best)) + 0.01 * run.seed)
    return queue.rows, new


@pytest.mark.parametrize(
    ("best", "expected"),
    [(0.2, set()), (0.01, {0.0125, 0.003125}), (1e-9, {0.0125, 0.003125, 0.00078125}), (10, {12.8, 51.2})],
)
def test_the_grid_is_extended_until_the_best_lies_within(best: float, expected: set[float], tmp_path: Path) -> None:
    rows, _ = searched("turned", tmp_path, best)
    own = [row for row in rows if row["side"] == "with"]
    beyond = {arms.strength_of(row["config"]) for row in own} - {0.05, 0.2, 0.8, 3.2}
    assert beyond == expected
    for strength in beyond:
        of_strength = [row["seed"] for row in own if arms.strength_of(row["config"]) == strength]
        assert set(of_strength) >= {0, 1, 2}
    finals = [row for row in own if row["stage"] == "final"]
    assert sorted(row["seed"] for row in finals) == list(range(100, 110))
    (strength,) = {arms.strength_of(row["config"]) for row in finals}
    every = {0.05, 0.2, 0.8, 3.2} | expected
    assert strength == min(every, key=lambda each: abs(math.log(each / best)))


def test_an_average_of_one_step_is_lora_and_not_tried(tmp_path: Path) -> None:
    _, runs = searched("averaging", tmp_path, 1e-9)
    assert {arms.strength_of(run.config) for run in runs if run.side == "with"} == {2, 5, 10, 20}
    assert arms.ARMS["averaging"].options("20", 0)[-1] == "--trainer.callbacks.decay=0.95"


@pytest.mark.parametrize("name", sorted(arms.ARMS))
def test_a_finished_arm_is_not_trained_again(name: str, tmp_path: Path) -> None:
    assert arms.search_of(name, Done(arms.published(name)), tmp_path).open_runs() == []  # type: ignore[arg-type]


def test_a_search_that_ended_at_its_largest_strength_goes_on_from_its_rows(tmp_path: Path) -> None:
    """As MonteCLoRA's first one, whose best was 0.003."""
    queue: Any = Done([row for row in arms.published("monteclora") if arms.TIMES not in row["config"]])
    search = arms.search_of("monteclora", queue, tmp_path)
    runs = search.open_runs()
    assert [(arms.strength_of(run.config), run.seed) for run in runs] == [(0.012, seed) for seed in (0, 1, 2)]
    assert '"sample_scaler": 0.012' in " ".join(search.arguments(runs[0].config, 0))
    assert not any("times" in each for each in search.arguments(runs[0].config, 0))
    for run in runs:
        queue.add(run, 9.0)
    assert search.open_runs() == []  # its final runs are there too


def test_a_new_arm_is_searched_from_the_start_trial_by_trial(tmp_path: Path) -> None:
    queue: Any = Done(without_a_perturbation("averaging"))
    runs = arms.search_of("averaging", queue, tmp_path).open_runs()
    assert [(run.side, run.trial) for run in runs] == [("with", 0)]


def test_trials_are_suggested_as_in_p1() -> None:
    """All that are published, from those before them."""
    published = Path(arms.__file__).parent
    tried: dict[str, list[Row]] = {}
    for row in read(published / "p1.jsonl") + read(published / "arms.jsonl"):
        if row["stage"] == "search" and row["seed"] == 0 and row["trial"] < arms.TRIALS // 2:
            tried.setdefault(row.get("arm", row["side"]), []).append(row)
    assert len(tried) >= 7
    for rows in tried.values():
        rows.sort(key=lambda row: int(row["trial"]))
        assert [row["trial"] for row in rows] == list(range(12))
        strengths = sorted({row["config"]["rho"] for row in rows}, key=float)
        judgements: list[tuple[Config, float]] = []
        for row in rows:
            assert arms.suggestion({**arms.SPACE, "rho": strengths}, judgements) == row["config"]
            judgements.append((row["config"], row["value"]))


def test_a_row_names_the_checkpoint_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = arms.search_of("turned", Done(without_a_perturbation("turned")), tmp_path)  # type: ignore[arg-type]
    run = search.open_runs()[0]
    monkeypatch.setattr(arms.Search, "perform", lambda self, run, trial: {"value": 2.0})
    trial: Any = None
    assert search.perform(run, trial) == {"value": 2.0, "checkpoint": None}
    (tmp_path / run.name).mkdir(parents=True)
    (tmp_path / run.name / "fit.json").write_text('{"best": "checkpoints/epoch=1-step=50.ckpt"}')
    assert search.perform(run, trial)["checkpoint"] == "epoch=1-step=50"


def test_a_rate_beyond_the_grid_gets_final_runs_only_if_it_is_better() -> None:
    rows = read(Path(p1_rate.__file__).parent / "p1_rate.jsonl")
    assert p1_rate.final(rows) == []
    better = [{**row, "value": 2.7} for row in rows]  # with 3e-3, the mean is 2.7022
    assert [run.seed for run in p1_rate.final(better)] == list(range(100, 110))
