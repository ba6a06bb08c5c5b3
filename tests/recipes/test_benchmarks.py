"""The benchmarks measure, print and write what they promise; the numbers themselves are not checked here."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from statistics import median

import processes
import pytest
import torch

from lightning_flatlora import find_pairs
from recipes.benchmarks import memory
from recipes.benchmarks.step import main
from recipes.benchmarks.workloads import WORKLOADS

MILLIONS = {"minilm": 23, "smollm2": 135, "roberta-large": 355, "gpt2-medium": 355, "vit-b16": 86}


def test_step_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "step.json"
    main(["--models", "tiny", "--ranks", "2", "3", "--rounds", "2", "--steps", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [row["rank"] for row in result["steps"]] == [2] * 3 + [3] * 3
    methods = {row["method"]: row for row in result["steps"]}
    assert methods["LoRA"]["ratio_to_lora"] == 1.0
    assert set(methods) == {"LoRA", "EFMLoRA", "FMLoRA"}
    assert all(row["median_seconds"] > 0 for row in methods.values())
    assert all(row["ratio_to_lora"] == median(row["ratios"]) for row in methods.values())
    assert [len(row["ratios"]) for row in methods.values()] == [2, 2, 2]
    assert "EFMLoRA" in capsys.readouterr().out


@pytest.mark.parametrize("name", MILLIONS)
def test_workloads_are_of_the_sizes_they_are_named_after(name: str) -> None:
    with torch.device("meta"):
        model = replace(WORKLOADS[name], full=True).network()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == MILLIONS[name]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_adapter_of_a_workload_is_on_every_layer(name: str) -> None:
    with torch.device("meta"):
        pairs = find_pairs(replace(WORKLOADS[name], layers=2).network()).pairs
    # GPT-2 has q, k and v in one layer. The experts have two parameters per layer, and a router.
    in_a_layer = {"gpt2-medium": 1, "small-layers": 1, "mixture-of-experts": 4 + 3}
    assert len(pairs) == 2 * in_a_layer.get(name, 2)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # Processes that have already imported the libraries.
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda method: processes.SERVER)
    output = tmp_path / "new" / "memory.json"
    memory.main(["--model", "tiny", "--methods", "EFMLoRA", "--steps", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["method"] == "EFMLoRA"
    assert row["peak_mib"] > 0
    assert "peak_mib" in capsys.readouterr().out
