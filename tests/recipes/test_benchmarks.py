"""The benchmark measures, prints and writes what it says; its figures are not judged here."""

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the recipes' dependencies are not installed")

from recipes.benchmarks.step import main


def test_step_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "step.json"
    sizes = ["--models", "tiny", "--rounds", "2", "--steps", "2", "--repeats", "2", "--layers", "3", "12", "16", "4"]
    main([*sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    methods = result["steps"]["tiny"]
    assert methods["LoRA"]["ratio_to_lora"] == 1.0
    assert set(methods) == {"LoRA", "EFMLoRA", "FMLoRA"}
    assert all(row["median_seconds"] > 0 for row in methods.values())
    assert result["engine"]["dense_over_closed"] > 0
    assert "EFMLoRA" in capsys.readouterr().out
