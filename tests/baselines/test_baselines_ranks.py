"""Two gloo processes under DDP equal one process on the joint batch; LoRA-SAM does so under FSDP too."""

from itertools import product
from typing import Any

import pytest
from baselines.ranks import train
from ddp_runs import difference, turns
from helpers import BASELINES, since_lightning
from launch import Results, launch

DDP = list(product(BASELINES, (1, 2)))
SHARDED = list(product(("fsdp2", "fsdp1-layers"), (1, 2)))
"""Names or strategies, and batches of an optimizer step."""
NO_MIXED_PRECISION = since_lightning("2.6.0", "FSDP1 in float64, without mixed precision, fails in Lightning 2.5")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, Any] = {f"{n} {a}": {"name": n, "strategy": "ddp", "accumulate": a} for n, a in DDP}
    runs |= {f"{s} {a}": {"name": "LoRASAM", "strategy": s, "accumulate": a} for s, a in SHARDED}
    for name in ("SAM", "LoRASAM"):
        runs[f"{name} own"] = {"name": name, "strategy": "ddp", "sync_ascent": False}
    found = {name: ("baselines.ranks:train", arguments) for name, arguments in runs.items()}
    return launch(tmp_path_factory.mktemp("baselines"), found)


def assert_equal_to_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    first, second = ranks
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10


@pytest.mark.parametrize(("name", "accumulate"), DDP)
def test_two_ranks_equal_one_process_on_the_joint_batch(results: Results, name: str, accumulate: int) -> None:
    assert_equal_to_one_process(results[f"{name} {accumulate}"], train(name, accumulate=accumulate))


@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [pytest.param(*each, marks=NO_MIXED_PRECISION if each[0].startswith("fsdp1") else ()) for each in SHARDED],
)
def test_lora_sam_sharded_equals_one_process(results: Results, strategy: str, accumulate: int) -> None:
    assert_equal_to_one_process(results[f"{strategy} {accumulate}"], train("LoRASAM", accumulate=accumulate))


@pytest.mark.parametrize("name", ["SAM", "LoRASAM"])
def test_an_ascent_of_each_rank_equals_one_of_each_micro_batch(results: Results, name: str) -> None:
    assert_equal_to_one_process(results[f"{name} own"], train(name, accumulate=2, loader=turns()))
