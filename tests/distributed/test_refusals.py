"""Strategies that can't work are refused before the first step, on every rank, in one message that says what to do.

tests/callbacks/test_refused_strategies.py has what one process can see.
"""

from typing import Any

import pytest
from launch import Results, launch

FSDP = "fsdp1-layers"
SYNC_ASCENT = ("sync_ascent=False needs each rank's own gradient", "use sync_ascent=True, or DDP")
TENSOR_PARALLEL = ("tensor_parallel_size must be 1, got 2", "data_parallel_size=2, tensor_parallel_size=1")
STATIC = {"strategy_settings": {"static_graph": True}}
# The strategy, the front end, their settings, and what the message has to say.
CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    (FSDP, "FMLoRAModule", {}, ("manual optimization", "use the FMLoRA or EFMLoRA callback", "ModelParallelStrategy")),
    (FSDP, "EFMLoRA by hand", {}, ("manual optimization", "with automatic optimization", "ModelParallelStrategy")),
    (FSDP, "FMLoRA", {"strategy_settings": {"use_orig_params": False}}, ("must be True", "got False", "Leave it out")),
    (FSDP, "EFMLoRA", {"strategy_settings": {"cpu_offload": True}}, ("cpu_offload must be False, got True",)),
    (FSDP, "FMLoRA", {"strategy_settings": {"sharding_strategy": "NO_SHARD"}}, ("'FULL_SHARD', got 'NO_SHARD'", "ddp")),
    (FSDP, "FMLoRA", {"sync_ascent": False}, SYNC_ASCENT),
    ("fsdp2", "FMLoRAModule", {"sync_ascent": False}, SYNC_ASCENT),
    ("tensor-parallel", "EFMLoRA", {}, TENSOR_PARALLEL),
    ("ddp", "EFMLoRA", {**STATIC, "scheduled": {"1": 3}}, ("accumulate_grad_batches=3", "leave static_graph out")),
    ("ddp", "FMLoRA", {**STATIC, "sync_ascent": False}, ("sync_ascent=False", "leave static_graph out")),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = {}
    for place, (strategy, front_end, settings, _) in enumerate(CASES):
        runs[str(place)] = ("refusal_runs:refused", {"strategy": strategy, "front_end": front_end, **settings})
    return launch(tmp_path_factory.mktemp("refusals"), runs)


@pytest.mark.parametrize("place", range(len(CASES)))
def test_every_rank_refuses_before_the_first_step(results: Results, place: int) -> None:
    _, front_end, _, words = CASES[place]
    first, second = results[str(place)]
    assert first == second
    assert first["steps"] == 0
    assert first["message"].startswith(f"{front_end.partition(' ')[0]}: ")
    assert "\n" not in first["message"], "one problem, one line"
    for word in words:
        assert word in first["message"]
