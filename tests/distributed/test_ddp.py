"""Two gloo processes under DDP equal one process on the joint batch, and hold one perturbation."""

from typing import Any

import pytest
from ddp_runs import difference, train_alone, train_called_off, train_routed, turns
from launch import Results, launch

FRONT_ENDS = ["EFMLoRA", "FMLoRA", "FMLoRAModule", "EFMLoRA+FMLoRAModule"]
STEPS: list[dict[str, Any]] = [
    {"accumulate": 1},
    {"accumulate": 2, "clip": [0.05, "norm"]},
    {"accumulate": 2, "clip": [0.01, "value"]},
]
BATCHES = 9  # odd: the last window of two is shorter
DDP_SETTINGS: list[tuple[list[str], int]] = [  # and the batches of a step: static_graph has no accumulation
    (["gradient_as_bucket_view", "find_unused_parameters"], 2),
    (["static_graph"], 1),
]
TWO_PASSES = ["FMLoRA", "FMLoRAModule"]


def name_of(*parts: object) -> str:
    return "-".join(map(str, parts)).replace("/", "")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for front_end in FRONT_ENDS:
        ddp = {"strategy": "ddp", "front_end": front_end}
        for step in STEPS:
            runs[name_of(front_end, step)] = "fits:train", {**ddp, **step, "batches": BATCHES}
        for settings, accumulate in DDP_SETTINGS:
            used = {
                "accumulate": accumulate,
                "epochs": 1,
                "batches": BATCHES,
                "strategy_settings": dict.fromkeys(settings, True),
            }
            runs[name_of(front_end, settings)] = "fits:train", {**ddp, **used}
    for front_end in TWO_PASSES:
        own = {"strategy": "ddp", "accumulate": 2, "sync_ascent": False, "batches": BATCHES}
        runs[name_of(front_end, "own")] = "fits:train", {"front_end": front_end, **own}
    for front_end in FRONT_ENDS[:3]:
        runs[name_of(front_end, "routed")] = "ddp_runs:train_routed", {"front_end": front_end}
    for front_end in FRONT_ENDS[:2]:
        named = {"front_end": front_end, "batches": BATCHES}
        runs[name_of(front_end, "other name")] = "ddp_runs:train_under_the_other_name", named
    runs["called off"] = "ddp_runs:train_called_off", {}
    return launch(tmp_path_factory.mktemp("ddp"), runs)


def assert_equal_to_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """To 1e-10 in weights and E, which are the same bits on both ranks, and not zero."""
    first, second = ranks
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10
    assert difference(first["E"], second["E"]) == 0
    assert difference(first["E"], alone["E"]) < 1e-10
    assert all((E != 0).any() for E in first["E"].values())


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_two_ranks_equal_one_process_on_the_joint_batch(results: Results, front_end: str, step: dict[str, Any]) -> None:
    assert_equal_to_one_process(results[name_of(front_end, step)], train_alone(front_end, batches=BATCHES, **step))


@pytest.mark.parametrize(("settings", "accumulate"), DDP_SETTINGS, ids=str)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_settings_of_ddp_change_nothing(results: Results, front_end: str, settings: list[str], accumulate: int) -> None:
    alone = train_alone(front_end, accumulate, epochs=1, batches=BATCHES)
    assert_equal_to_one_process(results[name_of(front_end, settings)], alone)


@pytest.mark.parametrize("front_end", FRONT_ENDS[:3])
def test_layers_that_are_unused_on_one_rank_or_on_all(results: Results, front_end: str) -> None:
    """Used early in an accumulation window and not in its last batch, a layer's gradient still reaches all ranks."""
    first, second = results[name_of(front_end, "routed")]
    alone = train_routed(front_end, alone=True)
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10


@pytest.mark.parametrize("front_end", TWO_PASSES)
def test_an_ascent_of_each_rank_equals_one_of_each_micro_batch(results: Results, front_end: str) -> None:
    """sync_ascent=False: E differs between ranks, as if one process took their halves in turn; weights are the same."""
    first, second = results[name_of(front_end, "own")]
    alone = train_alone(front_end, accumulate=4, loader=turns(), batches=2 * BATCHES)
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10
    assert difference(second["E"], alone["E"]) < 1e-10  # the second rank's half is the last in turn
    assert difference(first["E"], second["E"]) > 1e-3


def test_a_batch_called_off_leaves_ddp_synchronizing(results: Results) -> None:
    """FMLoRA, each rank's ascent its own: DDP was asked not to synchronize, and no backward came."""
    first, second = results["called off"]
    assert first["synchronizes"] == second["synchronizes"] == [True, True]
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], train_called_off(alone=True)["weights"]) < 1e-10


@pytest.mark.parametrize("front_end", FRONT_ENDS[:2])
def test_pytorch_lightning_trains_the_same(results: Results, front_end: str) -> None:
    there, here = results[name_of(front_end, "other name")], results[name_of(front_end, STEPS[0])]
    for one, other in zip(there, here, strict=True):
        assert difference(one["weights"], other["weights"]) == 0
        assert difference(one["E"], other["E"]) == 0
