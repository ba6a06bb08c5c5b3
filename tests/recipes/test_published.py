"""The published tables are what the published rows give, line by line.

A change of the settings, of how a choice is made or of a statistic would show.
"""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from recipes.comparison.__main__ import main as comparison
from recipes.reproduce.__main__ import main as reproduce
from recipes.shared.ledger import Row, read
from recipes.shared.statistics import estimate, with_error
from recipes.shared.tables import settings_text

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = DOCS / "results"


@pytest.mark.parametrize("workload", ["w1", "w2", "w3", "w5", "w6"])
def test_the_study(workload: str) -> None:
    """Seeds, accuracy and loss of every arm; the code that made rows and pages is archived."""
    by_arm: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for file in PUBLISHED.glob(f"evidence_{workload}*.jsonl"):
        for row in read(file):
            # Other files of a workload hold rows of other kinds.
            if row.get("workload") == workload and row.get("stage") == "test" and "test_accuracy" in row:
                by_arm[row["arm"], settings_text(row["config"])][row["seed"]] = row
    found = set()
    for (_, chosen), rows in by_arm.items():
        accuracy = estimate([100 * row["test_accuracy"] for row in rows.values()])
        loss = estimate([row["test_loss"] for row in rows.values()])
        found.add((chosen, str(len(rows)), with_error(accuracy), f"{loss.mean:.3f}"))
    shown = []
    page = (PUBLISHED / f"evidence_{workload}.md").read_text(encoding="utf-8")
    for table in page.split("| arm | chosen |")[1:]:
        for line in table.split("\n\n")[0].splitlines()[2:]:
            _, chosen, seeds, accuracy, _, _, loss = line.strip("| ").split(" | ")[:7]
            shown.append((chosen.strip(), seeds, accuracy, loss))
    assert len(shown) >= 5
    assert set(shown) <= found, set(shown) - found


def test_the_comparison(tmp_path: Path) -> None:
    assert comparison(["table", f"--from={PUBLISHED / 'comparison.jsonl'}", f"--folder={tmp_path}"]) == 0
    found = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    page = (PUBLISHED / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert len(found) > 100
    assert {line for line in found if line.startswith(("|", "-"))} <= set(page)


def test_table_1_offline(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "table1_offline.jsonl", tmp_path / "results.jsonl")
    assert reproduce(["table1_offline", f"--folder={tmp_path}"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    page = (DOCS / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    for method in ("LoRA", "EFMLoRA", "FMLoRA"):
        (figures,) = re.findall(rf"^\| {method} \|(.*± .*)", page, re.M)
        found = re.findall(rf"^\| {method} \|(.*± .*)", table, re.M)[0]
        assert re.sub(r" \(5\)", "", found) == figures
