"""The published tables are what the published rows give, line by line.

A change of the settings, of how a choice is made or of a statistic would show.
"""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from recipes.reproduce.__main__ import main as reproduce
from recipes.shared.ledger import Row, read
from recipes.shared.statistics import estimate, with_error

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = DOCS / "results"


def settings_text(config: dict[str, float]) -> str:
    """A configuration as the tables of the study write it."""
    text = ", ".join(f"{name} {value:g}" for name, value in config.items())
    return text.replace("learning_rate", "rate").replace("weight_decay", "decay")


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


def test_the_comparison() -> None:
    """Accuracy and loss of every method on every task; the code that made rows and page is archived."""
    by_run: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in read(PUBLISHED / "comparison.jsonl"):
        if row["part"] == "test":
            by_run[row["task"], row["method"], settings_text(row["config"])].append(row)
    found = set()
    for (task, method, _), rows in by_run.items():
        accuracy = estimate([100 * row["accuracy"] for row in rows])
        loss = estimate([row["loss"] for row in rows])
        found.add((task, method, with_error(accuracy), f"{loss.mean:.3f}"))
    shown = set()
    page = (PUBLISHED / "comparison.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        task, _, seeds = section.partition("\n")[0].partition(", ")
        if not seeds.endswith("seeds"):
            continue  # the tables of all tasks
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if line.startswith("| ") and cells[0] not in ("method", "---"):
                method = cells[0].partition(" ")[0]  # perhaps with a number of seeds
                shown.add((task, method, cells[2], cells[5]))
    assert len(shown) > 50
    assert shown <= found, shown - found


def test_table_1_offline(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "table1_offline.jsonl", tmp_path / "results.jsonl")
    assert reproduce(["table1_offline", f"--folder={tmp_path}"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    page = (DOCS / "recipes" / "reproduce.md").read_text(encoding="utf-8")
    for method in ("LoRA", "EFMLoRA", "FMLoRA"):
        (figures,) = re.findall(rf"^\| {method} \|(.*± .*)", page, re.M)
        found = re.findall(rf"^\| {method} \|(.*± .*)", table, re.M)[0]
        assert re.sub(r" \(5\)", "", found) == figures
