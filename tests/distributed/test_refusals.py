"""Strategies that can't work are refused before the first step, on every rank, in one message that says what to do."""

from typing import Any

import pytest
from launch import Results, launch

FSDP = "fsdp1-layers"
LEFT_OUT = ("static_graph=True", "leave static_graph out")
# a run's name: the strategy, the front end, their settings, and what the message has to say
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "FMLoRAModule under FSDP1": (
        FSDP,
        "FMLoRAModule",
        {},
        ("FMLoRAModule: manual optimization", "use the FMLoRA or EFMLoRA callback", "ModelParallelStrategy"),
    ),
    "manual optimization under FSDP1": (
        FSDP,
        "EFMLoRA by hand",
        {},
        ("EFMLoRA: manual optimization", "with automatic optimization", "ModelParallelStrategy"),
    ),
    "use_orig_params": (
        FSDP,
        "FMLoRA",
        {"strategy_settings": {"use_orig_params": False}},
        ("FMLoRA: use_orig_params must be True, Lightning's default, got False", "Leave it out"),
    ),
    "cpu_offload": (
        FSDP,
        "EFMLoRA",
        {"strategy_settings": {"cpu_offload": True}},
        ("EFMLoRA: cpu_offload must be False, got True",),
    ),
    "sync_ascent under FSDP1": (
        FSDP,
        "FMLoRA",
        {"sync_ascent": False},
        ("FMLoRA: sync_ascent=False needs each rank's own gradient", "use sync_ascent=True, or DDP"),
    ),
    "sync_ascent under FSDP2": (
        "fsdp2",
        "FMLoRAModule",
        {"sync_ascent": False},
        ("FMLoRAModule: sync_ascent=False needs each rank's own gradient", "use sync_ascent=True, or DDP"),
    ),
    "tensor parallelism": (
        "tensor-parallel",
        "EFMLoRA",
        {"strategy_settings": {"data_parallel_size": 1, "tensor_parallel_size": 2}},
        ("EFMLoRA: tensor_parallel_size must be 1, got 2", "data_parallel_size=2, tensor_parallel_size=1"),
    ),
    "tensor parallelism, Lightning's default": (
        "tensor-parallel",
        "FMLoRA",
        {},
        ("FMLoRA: tensor_parallel_size must be 1, got 2", "data_parallel_size=2, tensor_parallel_size=1"),
    ),
    "static_graph and accumulation from a later epoch on": (
        "ddp",
        "EFMLoRA",
        {"strategy_settings": {"static_graph": True}, "scheduled": {"1": 3}},
        ("EFMLoRA: DDP's", "accumulate_grad_batches=3", *LEFT_OUT),
    ),
    "static_graph and ascents that don't synchronize": (
        "ddp",
        "FMLoRA",
        {"strategy_settings": {"static_graph": True}, "sync_ascent": False},
        ("FMLoRA: DDP's", "sync_ascent=False", *LEFT_OUT),
    ),
}
for sharding, front_end in (("SHARD_GRAD_OP", "EFMLoRA"), ("NO_SHARD", "FMLoRA"), ("HYBRID_SHARD", "FMLoRA")):
    CASES[sharding] = (
        FSDP,
        front_end,
        {"strategy_settings": {"sharding_strategy": sharding}},
        (f"{front_end}: sharding_strategy must be 'FULL_SHARD', got '{sharding}'", "use strategy='ddp'"),
    )
for front_end in ("EFMLoRA", "FMLoRA", "FMLoRAModule"):
    CASES[f"static_graph and accumulation with {front_end}"] = (
        "ddp",
        front_end,
        {"strategy_settings": {"static_graph": True}, "accumulate": 2},
        (f"{front_end}: DDP's", "accumulate_grad_batches=2", *LEFT_OUT),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = {
        name: ("refusal_runs:refused", {"strategy": strategy, "front_end": front_end, **settings})
        for name, (strategy, front_end, settings, _) in CASES.items()
    }
    return launch(tmp_path_factory.mktemp("refusals"), runs)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses_before_the_first_step(results: Results, case: str) -> None:
    first, second = results[case]
    assert first == second
    assert first["steps"] == 0
    assert "\n" not in first["message"], "one problem, one line"
    for words in CASES[case][-1]:
        assert words in first["message"]
