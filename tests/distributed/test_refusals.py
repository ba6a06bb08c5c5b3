"""Unusable strategies are refused before the first step, on every rank, in one message that says what to do.

For what a single process can see, see tests/callbacks/test_refused_strategies.py.
"""

from functools import partial
from typing import Any

import pytest
import torch
from fits import ShardedAutomatic, own_share, parts, places, single, strategy_of
from float64_runs import RHO, fit_in_float64, network
from launch import Results, Runs, launch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import EFMLoRA

FSDP = "fsdp1-layers"
SYNC_ASCENT = ("sync_ascent=False needs each rank's own gradient", "use sync_ascent=True, or DDP")
STATIC = {"strategy_settings": {"static_graph": True}}
# The strategy, the front end, their settings, and words of the message.
CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    (FSDP, "FMLoRAModule", {}, ("manual optimization", "use the FMLoRA or EFMLoRA callback", "ModelParallelStrategy")),
    (FSDP, "EFMLoRA by hand", {}, ("manual optimization", "with automatic optimization", "ModelParallelStrategy")),
    (FSDP, "FMLoRA", {"strategy_settings": {"use_orig_params": False}}, ("must be True", "got False", "leave it out")),
    (FSDP, "EFMLoRA", {"strategy_settings": {"cpu_offload": True}}, ("cpu_offload must be False, got True",)),
    (FSDP, "FMLoRA", {"strategy_settings": {"sharding_strategy": "NO_SHARD"}}, ("'FULL_SHARD', got 'NO_SHARD'", "ddp")),
    (FSDP, "FMLoRA", {"sync_ascent": False}, SYNC_ASCENT),
    ("fsdp2", "FMLoRAModule", {"sync_ascent": False}, SYNC_ASCENT),
    ("ddp", "FMLoRA", {**STATIC, "accumulate": 2}, ("accumulate_grad_batches=2", "leave static_graph out")),
    ("ddp", "EFMLoRA", {**STATIC, "scheduled": {1: 3}}, ("accumulate_grad_batches=3", "leave static_graph out")),
    ("ddp", "FMLoRA", {**STATIC, "sync_ascent": False}, ("sync_ascent=False", "leave static_graph out")),
]


class ByHand(ShardedAutomatic):
    """A user's own manual optimization."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False


def refused(
    strategy: str,
    front_end: str,
    strategy_settings: dict[str, Any] | None = None,
    accumulate: int = 1,
    scheduled: dict[int, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The refusal's message, and the number of steps before it.

    Args:
        strategy: as in fits.strategy_of.
        front_end: as in fits.parts, or "EFMLoRA by hand".
        strategy_settings: passed to the strategy.
        accumulate: batches per step.
        scheduled: batches per step by epoch, for a GradientAccumulationScheduler.
        settings: passed to the front end.
    """
    net = network().float()
    if front_end == "EFMLoRA by hand":
        module, callbacks, trainer = ByHand(net), [EFMLoRA(RHO)], {}
    else:
        module, callbacks, trainer = parts(front_end, net, accumulate, **settings)
    used = strategy_of(strategy, **(strategy_settings or {}))
    if scheduled:
        callbacks.append(GradientAccumulationScheduler(scheduled))
    steps = []
    module.on_before_batch_transfer = lambda batch, index: steps.append(index) or batch
    trainer |= {"strategy": used, "precision": "32-true", **places()}
    try:
        fit_in_float64(module, 1, callbacks, own_share(single()), **trainer)
    except MisconfigurationException as error:
        return {"message": str(error), "steps": len(steps)}
    raise AssertionError("it was not refused")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for index, (strategy, front_end, settings, _) in enumerate(CASES):
        runs[str(index)] = partial(refused, strategy, front_end, **settings)
    return launch(tmp_path_factory.mktemp("refusals"), runs)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_every_rank_refuses_before_the_first_step(results: Results, index: int) -> None:
    _, front_end, _, words = CASES[index]
    first, second = results[str(index)]
    assert first == second
    assert first["steps"] == 0
    assert first["message"].startswith(f"{front_end.partition(' ')[0]}: ")
    assert "\n" not in first["message"], "one problem, one line"
    for word in words:
        assert word in first["message"]
