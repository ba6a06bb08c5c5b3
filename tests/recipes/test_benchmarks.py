"""The benchmarks measure, print and write what they say; their figures are not judged here."""

import json
import platform
from pathlib import Path
from statistics import median
from subprocess import CompletedProcess
from typing import Any

import processes
import pytest
import torch
from transformers import AutoModel

from lightning_flatlora import find_pairs
from recipes.benchmarks import memory
from recipes.benchmarks.step import main
from recipes.benchmarks.workloads import WORKLOADS

SIZES = [(name, WORKLOADS[name]) for name in ("minilm", "smollm2", "roberta-large", "gpt2-medium", "vit-b16")]


def test_step_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "step.json"
    sizes = ["--models", "tiny", "--rounds", "2", "--steps", "2", "--repeats", "2", "--layers", "3", "12", "16", "4"]
    main([*sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    methods = {row["method"]: row for row in result["steps"]}
    assert methods["LoRA"]["ratio_to_lora"] == 1.0
    assert set(methods) == {"LoRA", "EFMLoRA", "FMLoRA"}
    assert all(row["median_seconds"] > 0 for row in methods.values())
    assert all(row["ratio_to_lora"] == median(row["ratios"]) for row in methods.values())
    assert [len(row["ratios"]) for row in methods.values()] == [2, 2, 2]
    assert result["engine"]["dense_over_closed"] > 0
    assert "EFMLoRA" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 0


def test_workloads_are_of_the_sizes_they_are_named_after() -> None:
    sizes = {}
    for name, workload in SIZES:
        with torch.device("meta"):
            model = AutoModel.from_config(workload.config)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "minilm": 23, "smollm2": 135, "roberta-large": 355, "gpt2-medium": 355, "vit-b16": 86,
    }  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_adapter_of_a_workload_is_on_every_layer(name: str) -> None:
    with torch.device("meta"):
        pairs = find_pairs(WORKLOADS[name].varied("layers", 2).network()).pairs
    alone = name in ("gpt2-medium", "small-layers")  # GPT-2 has q, k and v in one
    assert len(pairs) == 2 * (1 if alone else 2)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(command: list[str], **settings: Any) -> CompletedProcess[str]:
        """In a process that has imported the libraries already."""
        place = command.index("recipes.benchmarks.memory")
        output = tmp_path / "output.txt"
        assert processes.run(processes.run_module, command[place], command[place + 1 :], output=output) == 0
        return CompletedProcess(command, 0, output.read_text())

    monkeypatch.setattr(memory.subprocess, "run", launched)
    output = tmp_path / "new" / "memory.json"
    memory.main(["--model", "tiny", "--methods", "EFMLoRA", "--steps", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["method"] == "EFMLoRA"
    assert 0 < row["held_mib"] <= row["peak_mib"]
    assert "between steps" in capsys.readouterr().out
