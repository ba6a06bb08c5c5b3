"""What the perturbation adds to the communication of a step, in bytes of the tensors given to collectives."""

from itertools import product

import pytest
from launch import Results, launch

WANTED = [*product(("ddp", "fsdp2", "fsdp1-layers"), ("LoRA", "EFMLoRA"), (2,)), ("fsdp2", "LoRA", 1)]
WANTED += [("ddp", "FMLoRA", 2), ("fsdp2", "FMLoRA", 1)]
RUNS = {}
for strategy, front_end, accumulate in WANTED:
    settings = {"strategy": strategy, "front_end": front_end, "accumulate": accumulate}
    RUNS[f"{strategy}:{front_end}:{accumulate}"] = settings


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = {name: ("communication_runs:count", arguments) for name, arguments in RUNS.items()}
    return launch(tmp_path_factory.mktemp("communication"), runs)


def added(results: Results, strategy: str, front_end: str, accumulate: int) -> tuple[int, int, int]:
    """Bytes and calls of a step beyond LoRA's, and bytes of all A and B."""
    ours, lora = (results[f"{strategy}:{name}:{accumulate}"][0] for name in (front_end, "LoRA"))
    return ours["bytes"] - lora["bytes"], ours["calls"] - lora["calls"], ours["factors"]


def test_efmlora_adds_nothing_under_ddp(results: Results) -> None:
    assert added(results, "ddp", "EFMLoRA", accumulate=2)[:2] == (0, 0)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1-layers"])
def test_efmlora_gathers_the_factors_and_their_gradients_once_a_step_under_fsdp(
    results: Results, strategy: str
) -> None:
    added_bytes, added_calls, factors = added(results, strategy, "EFMLoRA", accumulate=2)
    assert added_bytes == 2 * factors
    assert added_calls == 4 * 2  # the network's layers have two shapes, so two stacks


def test_fmlora_sends_only_the_factors_gradients_for_an_ascent_under_ddp_with_accumulation(results: Results) -> None:
    added_bytes, _, factors = added(results, "ddp", "FMLoRA", accumulate=2)
    assert added_bytes == 2 * factors


def test_fmlora_costs_a_second_pass_and_a_gathering_of_the_factors_under_fsdp2(results: Results) -> None:
    lora = results["fsdp2:LoRA:1"][0]["bytes"]
    added_bytes, _, factors = added(results, "fsdp2", "FMLoRA", accumulate=1)
    assert added_bytes == lora + 2 * factors
