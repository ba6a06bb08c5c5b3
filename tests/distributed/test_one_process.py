"""FSDP2 and FSDP1 in one process, which shards nothing: on the CPU, and on a CUDA device where there is one."""

from typing import Any

import pytest
import torch
from fits import relative_difference
from launch import Results, launch

FRONT_ENDS = ("EFMLoRA", "FMLoRA", "FMLoRAModule")
CASES: dict[str, dict[str, Any]] = {}
for strategy, front_ends in {
    "single": FRONT_ENDS,
    "fsdp2": FRONT_ENDS,
    "fsdp1": ("EFMLoRA", "FMLoRA"),  # it has no manual optimization
}.items():
    for front_end in front_ends:
        for precision in ("32-true", "bf16-mixed"):
            case = {"strategy": strategy, "front_end": front_end, "accumulate": 2, "precision": precision}
            CASES[f"{strategy}:{front_end}:{precision}"] = case
SHARDED = [name for name in CASES if not name.startswith("single")]
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, case in CASES.items():
        runs[name] = ("fsdp_runs:alone", {**case, "accelerator": request.param})
    if request.param == "cpu":
        for front_end in FRONT_ENDS:
            for batches in (0, 1):
                case = {"front_end": front_end, "batches": batches}
                runs[f"validated:{front_end}:{batches}"] = ("fsdp_runs:validated", case)
    return launch(tmp_path_factory.mktemp("one"), runs, ranks=1)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharding_strategy_of_world_size_1_equals_one_device(results: Results, name: str) -> None:
    (sharded,), (single,) = results[name], results["single:" + name.partition(":")[2]]
    assert any((E != 0).any() for E in sharded["E"].values())
    tolerance = 1e-5 if "32" in name else 0.1  # FSDP1's plugin also reduces and holds the layers' weights in bfloat16
    for kind in ("weights", "E"):
        assert relative_difference(sharded[kind], single[kind]) < tolerance


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("results", ["cpu"], indirect=True)
def test_a_validation_changes_nothing_where_the_root_holds_the_pairs(results: Results, front_end: str) -> None:
    """FSDP2 leaves the root's parameters whole after a forward without a backward."""
    (plain,), (validated,) = results[f"validated:{front_end}:0"], results[f"validated:{front_end}:1"]
    assert all(torch.equal(weight, validated["weights"][name]) for name, weight in plain["weights"].items())
