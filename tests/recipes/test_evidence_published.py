"""The published tables of the study are what its published rows give, line by line."""

import shutil
from pathlib import Path

import pytest

from recipes.evidence.__main__ import main
from recipes.evidence.plan import RESULTS
from recipes.evidence.workloads import SEARCHED_AS, WORKLOADS

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
JUDGED_LATER = ("robustness", "merge_weights")


@pytest.mark.parametrize("workload", ["w1", "w2", "w3", "w5", "w6"])
def test_rows_give_the_tables(workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of the settings, of a choice or of a figure would show."""
    with (tmp_path / RESULTS).open("wb") as results:
        for name in ("", "_noise"):  # other shares of replaced labels stand in the workload's own tables
            file = PUBLISHED / f"evidence_{workload}{name}.jsonl"
            results.write(file.read_bytes() if file.exists() else b"")
    for name in JUDGED_LATER:
        file = PUBLISHED / f"evidence_{workload}_{name}.jsonl"
        if file.exists():
            shutil.copy(file, tmp_path / f"{name}.jsonl")
    assert main(["report", "--workload", workload, "--folder", str(tmp_path), "--precision", "bf16-mixed"]) == 0
    assert "EFMLoRA minus LoRA" in capsys.readouterr().out
    page = (PUBLISHED / f"evidence_{workload}.md").read_text(encoding="utf-8").splitlines()
    for file in tmp_path.glob("*.md"):
        for table in file.read_text(encoding="utf-8").split("\n### ")[1:]:
            heading, *lines = table.splitlines()
            is_extended = heading in ("w2, search of LoRA", "w2, search of Flat-LoRA")  # by rows of another file
            assert is_extended or {line for line in lines if line.startswith("|")} <= set(page), heading


def test_only_the_noise_differs_between_workloads_of_one_search() -> None:
    for name, searched_as in SEARCHED_AS.items():
        noise = {entry: value for entry, value in WORKLOADS[name].items() if entry.startswith("noise")}
        assert {**WORKLOADS[searched_as], **noise} == WORKLOADS[name]
        assert noise != {"noise": WORKLOADS[searched_as]["noise"]}
