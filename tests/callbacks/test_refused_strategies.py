"""Strategies that can't work are refused with the remedy, and those that are like supported ones are served."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Classifier, TwoPassClassifier, trainer_of
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_flatlora import EFMLoRA, FMLoRA
from lightning_flatlora.callbacks.strategies import monitor_problems


def fake_trainer(strategy: Any, module: Any, callback: Any, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        strategy=strategy,
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        lightning_module=module,
        optimizers=[object()],
        lr_scheduler_configs=[],
    )


def strategy_problems_of(strategy: Any, front_end: Any, accumulate: int = 1) -> list[str]:
    module = front_end(1.0) if front_end is TwoPassClassifier else Classifier()
    callback = module._callback if isinstance(module, TwoPassClassifier) else front_end(1.0)
    return callback.configuration_problems(fake_trainer(strategy, module, callback, accumulate), module)


def without_its_library(kind: type[Strategy]) -> Strategy:
    """A strategy whose own constructor wants DeepSpeed or torch_xla."""
    return kind.__new__(kind)


STATIC = partial(DDPStrategy, static_graph=True)


class MyTPU(XLAStrategy):
    """A user's own, under a name that does not say what it is."""


class Homemade(Strategy):
    """Neither of a known kind nor complete."""


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, TwoPassClassifier])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DeepSpeedStrategy, ["DeepSpeed owns the gradients and gives them to no callback"]),
        (XLAStrategy, ["the strategy XLAStrategy has not been tested", NO_TPU]),
        (SingleDeviceXLAStrategy, ["the strategy SingleDeviceXLAStrategy has not been tested", NO_TPU]),
        (MyTPU, ["the strategy MyTPU has not been tested", NO_TPU]),
        (Homemade, ["the strategy Homemade has not been tested"]),
    ],
)
def test_strategies_that_are_not_supported(monkeypatch, front_end, kind, words):
    monkeypatch.setattr(kind, "__abstractmethods__", frozenset())
    (problem,) = strategy_problems_of(without_its_library(kind), front_end)
    for word in (*words, "use strategy='ddp'", "ModelParallelStrategy (FSDP2)", "strategy='fsdp'"):
        assert word in problem


@pytest.mark.parametrize(
    ("strategy", "front_end", "accumulate", "words"),
    [
        (FSDPStrategy, TwoPassClassifier, 1, ["manual optimization", "FMLoRA or EFMLoRA callback", "(FSDP2)"]),
        (STATIC, EFMLoRA, 2, ["static_graph=True", "accumulate_grad_batches=2"]),
        (STATIC, FMLoRA, 2, ["static_graph=True", "accumulate_grad_batches=2"]),
        (STATIC, FMLoRA, 1, None),
    ],
)
def test_settings_of_supported_strategies(strategy, front_end, accumulate, words):
    problems = strategy_problems_of(strategy(), front_end, accumulate)
    assert len(problems) == (words is not None)
    for word in words or []:
        assert word in problems[0]


def test_efmlora_beside_a_module_whose_ranks_have_their_own_perturbation(monkeypatch):
    trainer = trainer_of(".", [EFMLoRA(1.0)])
    module = TwoPassClassifier(1.0, sync_ascent=False)
    trainer.strategy.connect(module)
    for ranks, is_refused in ((2, True), (1, False)):
        monkeypatch.setattr(type(trainer), "world_size", ranks)
        problems = module._callback.configuration_problems(trainer, module)
        assert any("sync_ascent=False leaves each rank its own E" in problem for problem in problems) is is_refused


class OwnDDP(DDPStrategy):
    """A user's own, or another library's."""


@pytest.fixture
def one_process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


UNWRAPPED = ["the strategy Megatron is a DDPStrategy", "whose model is a Sequential", "use strategy='ddp'"]
NEMO = ["Megatron keeps gradients in buffers of its own"]


@pytest.mark.parametrize(
    ("kind", "wraps", "ranks", "words"),
    [
        (Megatron, lambda model: nn.Sequential(model), 1, UNWRAPPED),
        # Of which the group holds one.
        (
            Megatron,
            DistributedDataParallel,
            2,
            ["the strategy Megatron averages gradients over 1 of 2 ranks"],
        ),
        (MegatronStrategy, lambda model: None, 1, NEMO),
        (MegatronStrategy, DistributedDataParallel, 1, NEMO),
        (OwnDDP, DistributedDataParallel, 1, None),
    ],
)
def test_subclasses_of_ddp_are_served_if_they_wrap_as_it_does(one_process_group, kind, wraps, ranks, words):
    strategy = kind(cluster_environment=LightningEnvironment())
    strategy._model = wraps(nn.Linear(2, 2))
    strategy.cluster_environment.set_world_size(ranks)
    problems = strategy_problems_of(strategy, EFMLoRA)
    assert len(problems) == (words is not None)
    for word in words or []:
        assert word in problems[0]
    if kind is MegatronStrategy:
        assert monitor_problems(strategy) == problems
