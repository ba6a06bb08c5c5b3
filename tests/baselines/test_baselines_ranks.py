"""Two gloo processes under DDP equal one process on the joint batch; for LoRA-SAM this also holds under FSDP."""

import os
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from fits import (
    ShardedAutomatic,
    assert_equal_to_one_process,
    full_weights,
    in_float64,
    joint_batches,
    own_share,
    turns,
)
from float64_runs import fit_in_float64, network, trained
from helpers import BASELINES, SIZES, since_lightning
from launch import Results, Runs, launch

DDP = list(product(BASELINES, (1, 2)))
SHARDED = list(product(("fsdp2", "fsdp1-layers"), (1, 2)))
"""Names or strategies, and batches of an optimizer step."""
NO_MIXED_PRECISION = since_lightning("2.6.0", "FSDP1 in float64, without mixed precision, fails in Lightning 2.5")


def train(
    name: str, strategy: str | None = None, accumulate: int = 1, loader: Any = None, **settings: Any
) -> dict[str, Any]:
    """The full trained weights; without a strategy, those of one process on the joint batches."""
    net = network()
    module, callback = ShardedAutomatic(net), BASELINES[name](SIZES[name], **settings)
    if strategy is None:
        alone = joint_batches() if loader is None else loader
        module.configure_model = lambda: None
        fit_in_float64(module, 1, [callback], alone, accumulate_grad_batches=accumulate)
        return {"weights": trained(net)}
    ranks = in_float64(strategy)
    torch.manual_seed(int(os.environ["RANK"]))  # the noise must not come from the global generator
    fit_in_float64(module, 1, [callback], own_share(), accumulate_grad_batches=accumulate, **ranks)
    return {"weights": full_weights(ranks["strategy"], net)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {f"{name} {window}": partial(train, name, "ddp", window) for name, window in DDP}
    runs |= {f"{strategy} {window}": partial(train, "LoRASAM", strategy, window) for strategy, window in SHARDED}
    for name in ("SAM", "LoRASAM"):
        runs[f"{name} own"] = partial(train, name, "ddp", sync_ascent=False)
    return launch(tmp_path_factory.mktemp("baselines"), runs)


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
