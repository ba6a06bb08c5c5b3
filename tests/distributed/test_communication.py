"""What the perturbation adds to a step's communication, in bytes of the tensors given to collectives."""

from functools import partial
from itertools import product
from typing import Any

import lightning as L
import pytest
from fits import Collectives, in_float64, own_share, parts
from float64_runs import fit_in_float64, network
from launch import Results, launch

WANTED = [*product(("ddp", "fsdp2", "fsdp1-layers"), ("LoRA", "EFMLoRA"), (2,)), ("fsdp2", "LoRA", 1)]
WANTED += [("ddp", "FMLoRA", 2), ("fsdp2", "FMLoRA", 1)]


class OneStep(L.Callback):
    """Counts during the accumulation window that ends with the optimizer's third step."""

    def __init__(self, window: int) -> None:
        self.first, self.last = 2 * window, 3 * window - 1
        self.mode = Collectives()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            self.mode.__exit__(None, None, None)


def count(strategy: str, front_end: str, accumulate: int) -> dict[str, Any]:
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate)
    counter = OneStep(accumulate)
    trainer |= {"max_steps": 4, **in_float64(strategy)}
    fit_in_float64(module, 1, [*callbacks, counter], own_share(), **trainer)
    # Rank 3: two ranks share the rows of A unevenly, the rows of B evenly.
    factors = sum(p.numel() for name, p in network().named_parameters() if ".lora_" in name)
    return {"bytes": counter.mode.bytes, "calls": sum(counter.mode.calls.values()), "factors": 8 * factors}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = {":".join(map(str, wanted)): partial(count, *wanted) for wanted in WANTED}
    return launch(tmp_path_factory.mktemp("communication"), runs)


def added(results: Results, strategy: str, front_end: str, accumulate: int) -> tuple[int, int, int]:
    """Bytes and calls of a step beyond LoRA's, and the bytes of all A and B."""
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
