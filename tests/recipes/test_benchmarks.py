"""The benchmarks measure, print and write what they say; their figures are not judged here."""

import json
import platform
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the recipes' dependencies are not installed")

from recipes.benchmarks import memory
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


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "memory.json"
    sizes = ["--model", "tiny", "--processes", "2", "--strategies", "fsdp2", "--methods", "EFMLoRA", "--steps", "1"]
    memory.main([*sizes, "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["strategy"], row["processes"], row["method"]) == ("fsdp2", 2, "EFMLoRA")
    assert 0 < row["held_mib"] <= row["peak_mib"]
    assert [path.name for path in output.parent.iterdir()] == ["memory.json"]
    assert "between steps" in capsys.readouterr().out
