"""The published tables are what the published rows give, line by line.

A change of the settings, of how a choice is made or of a statistic would show.
"""

import re
import shutil
from pathlib import Path

import pytest

from recipes.comparison.__main__ import main as comparison
from recipes.evidence.__main__ import main as evidence
from recipes.evidence.plan import RESULTS
from recipes.evidence.workloads import SEARCHED_AS, WORKLOADS
from recipes.reproduce.__main__ import main as reproduce

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = DOCS / "results"
JUDGED_LATER = ("robustness", "merge_weights")


@pytest.mark.parametrize("workload", ["w1", "w2", "w3", "w5", "w6"])
def test_the_study(workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / RESULTS).open("wb") as results:
        for name in ("", "_noise"):  # other shares of replaced labels stand in the workload's own tables
            file = PUBLISHED / f"evidence_{workload}{name}.jsonl"
            results.write(file.read_bytes() if file.exists() else b"")
    for name in JUDGED_LATER:
        file = PUBLISHED / f"evidence_{workload}_{name}.jsonl"
        if file.exists():
            shutil.copy(file, tmp_path / f"{name}.jsonl")
    assert evidence(["report", "--workload", workload, "--folder", str(tmp_path), "--precision", "bf16-mixed"]) == 0
    assert "EFMLoRA minus LoRA" in capsys.readouterr().out
    page = (PUBLISHED / f"evidence_{workload}.md").read_text(encoding="utf-8").splitlines()
    for file in tmp_path.glob("*.md"):
        for table in file.read_text(encoding="utf-8").split("\n### ")[1:]:
            heading, *lines = table.splitlines()
            is_extended = heading in ("w2, search of LoRA", "w2, search of Flat-LoRA")  # by rows of another file
            assert is_extended or {line for line in lines if line.startswith("|")} <= set(page), heading


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


def test_only_the_noise_differs_between_workloads_of_one_search() -> None:
    for name, searched_as in SEARCHED_AS.items():
        noise = {entry: value for entry, value in WORKLOADS[name].items() if entry.startswith("noise")}
        assert {**WORKLOADS[searched_as], **noise} == WORKLOADS[name]
        assert noise != {"noise": WORKLOADS[searched_as]["noise"]}
