"""Tensor parallelism of transformers and of Lightning on two processes equals one process in float64."""

from functools import partial
from typing import Any

import pytest
from fits import difference, relative_difference, train_alone
from launch import Results, Runs, launch
from tensor_runs import by_lightning, by_loop, saved

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"limit": 0.3}, "window": {"window": 2, "limit": 0.3}}
METHODS = ["EFMLoRA", "FMLoRA"]
FRONT_ENDS = ["EFMLoRA", "FMLoRA", "FMLoRAModule"]


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    pytest.importorskip("transformers", "5.17")
    folder = str(tmp_path_factory.mktemp("base"))
    runs: Runs = {}
    for method in METHODS:
        for name, settings in SETTINGS.items():
            runs[f"{method} {name}"] = partial(by_loop, "tensor", folder, method, **settings)
        runs[f"{method} resumed"] = partial(by_loop, "tensor", folder, method, stops=True)
        # FSDP2 shards the base alone, since peft adds the adapter later.
        runs[f"{method} loaded"] = partial(by_loop, "loaded", folder, method, window=2, limit=0.3)
    for front_end in FRONT_ENDS:
        folder = str(tmp_path_factory.mktemp("checkpoints"))
        runs[f"Lightning {front_end} 2"] = partial(by_lightning, front_end, 2)
        runs[f"Lightning {front_end} 1"] = partial(by_lightning, front_end, 1, folder)
        runs[f"Lightning {front_end} resumed"] = partial(by_lightning, front_end, 1, folder, f"{folder}/epoch=0.ckpt")
        runs[f"Lightning {front_end} saved"] = partial(saved, f"{folder}/epoch=1")
    return launch(tmp_path_factory.mktemp("tensor"), runs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_transformers_split_model_equals_one_process(of: Results, method: str, name: str) -> None:
    alone = by_loop("alone", "", method, **SETTINGS[name])
    plain = by_loop("alone", "", None, **SETTINGS[name])
    assert difference(alone["weights"], plain["weights"]) > 1e-2
    for rank in of[f"{method} {name}"]:
        for part, expected in alone.items():
            assert difference(rank[part], expected) < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(of: Results, method: str) -> None:
    for rank, whole in zip(of[f"{method} resumed"], of[f"{method} plain"], strict=True):
        assert difference(rank["weights"], whole["weights"]) == 0
        assert difference(rank["E"], whole["E"]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_adapter_of_a_base_that_fsdp2_has_sharded_equals_one_process(of: Results, method: str) -> None:
    alone = by_loop("alone", "", method, window=2, limit=0.3)
    for rank in of[f"{method} loaded"]:
        for part, expected in alone.items():
            assert difference(rank[part], expected) < 1e-13


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_lightnings_split_model_equals_one_process(of: Results, front_end: str, accumulate: int) -> None:
    alone = train_alone(front_end, accumulate)
    for rank in of[f"Lightning {front_end} {accumulate}"]:
        for part, expected in alone.items():
            assert relative_difference(rank[part], expected) < 1e-12


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_lightnings_checkpoints_hold_whole_factors_and_resume(of: Results, front_end: str) -> None:
    whole = of[f"Lightning {front_end} 1"]
    for rank, expected in zip(of[f"Lightning {front_end} resumed"], whole, strict=True):
        for part in expected:
            assert difference(rank[part], expected[part]) == 0
    assert difference(of[f"Lightning {front_end} saved"][0], whole[0]["weights"]) == 0
