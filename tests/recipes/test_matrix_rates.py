"""The audit of column A in docs/results/matrix_rates.py, on made-up rows."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes.studies.rows import Row

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_a
import matrix_choice as choice
import matrix_rates as audit
from matrix_choice import DISTURBED, EFMLORA, FINAL_SEEDS, LORA, Run
from matrix_disturbances import CLEAN

LOWER_LORA, LOWER_EFMLORA = audit.STRENGTHS


def losses(run: Run, disturbance: str) -> float:
    """Rank 8 is best when nothing happens, and low rates of the others are beyond the bound."""
    clean = 1.0 + (run.settings["rank"] != 8) * 0.05 + 1000 * run.settings["rate"] * (run.arm == LOWER_EFMLORA)
    return clean + (disturbance != CLEAN) * (1 + len(run.arm) / 100) + 0.001 * (run.seed % 3)


def row_of(run: Run) -> Row:
    part = "test" if run.stage == "final" else "validation"
    return {**run.key(), part: {name: {"loss": losses(run, name)} for name in run.disturbances}}


@pytest.fixture
def rows_of_a(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Column A's rows, with one strength of each arm."""
    runs = [run for run in choice.searched() if run.strength in (None, *choice.STRENGTHS[run.arm][1:2])]
    searched = [row_of(run._replace(seed=seed)) for run in runs for seed in choice.SEARCH_SEEDS]
    rows = searched + [row_of(run) for run in choice.final(searched)]
    monkeypatch.setattr(audit, "rows_of_a", lambda: rows)
    return rows


def test_the_stages_are_column_as(rows_of_a: list[Row]) -> None:
    rows: dict[str, Row] = {}
    for stage in audit.STAGES:
        for run in stage(list(rows.values())):
            rows[run.name] = row_of(run)
    counts = Counter((row["arm"], row["stage"], row["seed"]) for row in rows.values())
    for arm in audit.STRENGTHS:
        assert counts[arm, "search", 0] == 48
        assert 8 <= counts[arm, "search", 1] == counts[arm, "search", 2] <= 48
        assert counts[arm, "final", FINAL_SEEDS[0]] == counts[arm, "final", FINAL_SEEDS[-1]] >= 1
    rates = {row["settings"]["rate"] for row in rows.values()}
    assert max(rates) == 2.5e-4
    lines = audit.table(list(rows.values())).splitlines()
    assert len(lines) == 2 + 2 * len(DISTURBED)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:2] == [DISTURBED[0], LOWER_EFMLORA]
    # The names of LoRA, EFMLoRA and LOWER_LORA are shorter by 16, 13 and 3 letters.
    assert [float(cell.split()[0]) for cell in cells[5:]] == pytest.approx([0.175, 0.145, 0.045], abs=0.06)


def test_an_arm_is_trained_with_its_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(matrix_a, "perform", trained.append)
    runs = audit.searched()
    assert [run.arm for run in runs] == [LOWER_LORA] * 48 + [LOWER_EFMLORA] * 48
    audit.perform(runs[0])
    audit.perform(runs[-1])
    assert trained == [runs[0]._replace(arm=LORA), runs[-1]._replace(arm=EFMLORA)]
