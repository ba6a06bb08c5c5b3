"""torch.compile under DDP: the same weights as without, and two graphs in all, one clean and one perturbed."""

import shutil
from typing import Any

import pytest
from compile_runs import BATCHES
from ddp_runs import difference, train_alone
from launch import Results, launch

RUNS: dict[str, dict[str, Any]] = {
    "EFMLoRA, network": {"front_end": "EFMLoRA", "compiled": "net"},
    "FMLoRA, module": {"front_end": "FMLoRA", "compiled": "module"},
    "EFMLoRA beside FMLoRAModule, network": {"front_end": "EFMLoRA+FMLoRAModule", "compiled": "net", "accumulate": 2},
}
INDUCTOR = {"FMLoRA, inductor": {"front_end": "FMLoRA", "compiled": "net", "backend": "inductor"}}
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
NAMES = [*RUNS, *(pytest.param(name, marks=needs_compiler) for name in INDUCTOR)]
RUNS |= INDUCTOR


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    possible = [name for name in RUNS if HAS_COMPILER or name not in INDUCTOR]
    runs: dict[str, tuple[str, dict[str, Any]]] = {name: ("compile_runs:train", RUNS[name]) for name in possible}
    for name in INDUCTOR:
        if name in runs:
            runs[name][1]["cache"] = str(tmp_path_factory.mktemp("inductor"))
    return launch(tmp_path_factory.mktemp("compile"), runs)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_run_equals_the_plain_one(results: Results, name: str) -> None:
    """That of one process on the joint batches, which test_ddp.py shows to be DDP's."""
    first, second = results[name]
    alone = train_alone(RUNS[name]["front_end"], RUNS[name].get("accumulate", 1), epochs=1, batches=BATCHES)
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10
    assert difference(first["E"], alone["E"]) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_switching_the_perturbation_on_and_off_compiles_nothing_anew(results: Results, name: str) -> None:
    for rank in results[name]:
        assert rank["graphs"][0] >= 1  # it is compiled at all
        assert rank["graphs"][1:] == [2] * (len(rank["graphs"]) - 1)
