"""FlatnessMonitor on two gloo processes: the numbers of one process on the joint batches, and no trace in training."""

from typing import Any

import pytest
import torch
from ddp_runs import difference
from flatness_runs import train
from launch import Results, launch

FRONT_ENDS = ["LoRA", "FMLoRA", "EFMLoRA+FMLoRAModule"]
SETTINGS = ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for front_end in FRONT_ENDS:
        for monitored in (True, False):
            run = {"front_end": front_end, "monitored": monitored}
            runs[f"{front_end}-{monitored}"] = "flatness_runs:train", {**run, "accumulate": 2}
    for monitored in (True, False):
        run = {"front_end": "EFMLoRA", "monitored": monitored, **dict.fromkeys(SETTINGS, True)}
        runs[f"EFMLoRA-{monitored}"] = "flatness_runs:train", run
    for strategy in ("fsdp1", "fsdp2"):
        runs[strategy] = "flatness_runs:refused", {"strategy": strategy}
    return launch(tmp_path_factory.mktemp("flatness"), runs)


@pytest.mark.parametrize("front_end", [*FRONT_ENDS, "EFMLoRA"])
def test_training_is_that_without_it(results: Results, front_end: str) -> None:
    """With EFMLoRA under settings of DDP that allow no batch beside those of training."""
    watched, plain = results[f"{front_end}-True"], results[f"{front_end}-False"]
    for one, other in zip(watched, plain, strict=True):
        assert difference(one["weights"], other["weights"]) == 0
        assert one["rows"][-1]
        assert not other["rows"][-1]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_all_ranks_have_the_numbers_of_one_process(results: Results, front_end: str) -> None:
    first, second = results[f"{front_end}-True"]
    alone = train(front_end, accumulate=2, alone=True)
    assert len(first["rows"]) == len(second["rows"]) == len(alone["rows"]) == 12
    assert not first["rows"][2]
    for one, other, expected in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        assert one.keys() == other.keys() == expected.keys()
        for name, value in one.items():
            assert value.equal(other[name]), name
            tolerance = 2e-2 if "eigenvalue" in name else 1e-6  # Lanczos ends at 1e-2
            if "residual" not in name:  # rounding alone
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-8, msg=name)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_sharded_models_are_refused_on_every_rank(results: Results, strategy: str) -> None:
    first, second = results[strategy]
    assert first == second
    assert "is not supported, because a sharded model has no whole weights to perturb" in first["message"]
