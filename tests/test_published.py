"""The published figures follow from the published rows: any change of rows, figures or statistics would show."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import create_trial

from recipes.reproduce.__main__ import main as reproduce
from recipes.reproduce.run import restored
from recipes.studies.queue import file_storage, open_study
from recipes.studies.rows import read
from recipes.tune.answer import answer
from recipes.tune.search import CONTROL

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = DOCS / "results"
sys.path.append(str(PUBLISHED))


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return runpy.run_path(str(PUBLISHED / "figures.py"))


def test_the_pages_are_as_the_script_writes_them(figures: dict[str, Any]) -> None:
    """The script covers every row of the study's tables and of those that it leaves to its rows' page."""
    for path, passages in figures["passages"]().items():
        page = path.read_text(encoding="utf-8")
        assert [each for each in passages if figures["written"](page, each) != page] == []
        if path.name != "when_to_use.md":
            rows = {line for line in page.splitlines() if re.match(r"\|.*\[[-+\d]", line)}
            assert rows
            assert rows <= set("\n".join(passages).splitlines())


def test_a_figure_that_the_rows_do_not_give_is_written_over(figures: dict[str, Any]) -> None:
    page = "LoRA has 75.20,\nEFMLoRA 1e-4 [-0.1, +2.3]; LoRA has no rows."
    assert figures["written"](page, "LoRA has 75.13, EFMLoRA 2e-4 [-0.2, +2]") == (
        "LoRA has 75.13,\nEFMLoRA 2e-4 [-0.2, +2]; LoRA has no rows."
    )
    with pytest.raises(ValueError, match=r"0 places of the page.* LoRA had 1"):
        figures["written"](page, "LoRA had 1")


def test_table_1_offline(tmp_path: Path) -> None:
    study = open_study(file_storage(tmp_path), "table1_offline", "max", {"options": []}, {"precision": "bf16-mixed"})
    for row in read(PUBLISHED / "table1_offline.jsonl"):
        run = restored({name: row[name] for name in ("table", "task", "method", "config", "seed", "part", "start")})
        value = row["metrics"]["val_score" if run.part == "validation" else "test_score"]
        known = {"name": run.name, "run": run.key(), "row": row}
        study.add_trial(create_trial(value=value, user_attrs=known))
    assert reproduce(["table1_offline", f"--folder={tmp_path}"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    page = (DOCS / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    for method in ("LoRA", "EFMLoRA", "FMLoRA"):
        (shown,) = re.findall(rf"^\| {method} \|(.*± .*)", page, re.M)
        found = re.findall(rf"^\| {method} \|(.*± .*)", table, re.M)[0]
        assert re.sub(r" \(5\)", "", found) == shown


def test_tune_does_not_take_the_ranks_gain_for_the_perturbations() -> None:
    """On the rows of P1 and its control."""
    found = answer(read(PUBLISHED / "p1.jsonl") + read(PUBLISHED / "p1_control.jsonl"), "min")
    difference = found.difference("without")
    assert difference.mean + difference.interval < 0  # without the control the verdict would have been "use it"
    assert found.winner == CONTROL
    assert "between 0.0157 worse and 0.00148 better than LoRA with the same other settings" in found.verdict()
