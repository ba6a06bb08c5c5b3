"""Unusable strategies are refused with a remedy; for what only ranks see, see tests/distributed/test_refusals.py."""

import sys
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

from lightning_flatlora import EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, RandomPerturbation
from lightning_flatlora.callbacks.strategies import monitor_problems

NO_TPU = "with accelerator='gpu' or 'cpu'"


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
    """A strategy whose own constructor needs DeepSpeed or torch_xla."""
    return kind.__new__(kind)


class MyTPU(XLAStrategy):
    """A user's own class, whose name doesn't tell what it is."""


class Homemade(Strategy):
    """Neither of a known kind nor complete."""


@pytest.mark.parametrize("front_end", [EFMLoRA, FMLoRA, TwoPassClassifier])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
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


@pytest.mark.parametrize("baseline", [SAM, BalancednessRegularization, RandomPerturbation, BiLoRA])
def test_baselines_that_need_whole_weights_refuse_shards(baseline):
    (problem,) = strategy_problems_of(FSDPStrategy(), baseline)
    assert "FSDPStrategy leaves each rank a part of every weight" in problem
    assert "use strategy='ddp'" in problem


@pytest.mark.parametrize("front_end", [FMLoRA, TwoPassClassifier])
def test_two_passes_under_deepspeed(front_end):
    strategy = without_its_library(DeepSpeedStrategy)
    strategy._model = nn.Linear(2, 2)
    (problem,) = strategy_problems_of(strategy, front_end)
    assert "DeepSpeed adds each pass to the gradients of the step, so two are impossible: use EFMLoRA" in problem


def test_efmlora_beside_a_module_whose_ranks_have_their_own_perturbation(monkeypatch):
    efmlora = EFMLoRA(1.0)
    trainer = trainer_of(".", [efmlora])
    module = TwoPassClassifier(1.0, sync_ascent=False)
    module._callback.efmlora = efmlora
    trainer.strategy.connect(module)
    for ranks, is_refused in ((2, True), (1, False)):
        monkeypatch.setattr(type(trainer), "world_size", ranks)
        problems = module._callback.configuration_problems(trainer, module)
        assert any("sync_ascent must be True next to EFMLoRA" in problem for problem in problems) is is_refused


class OwnDDP(DDPStrategy):
    """From a user or another library."""


@pytest.fixture
def one_process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_subclass_of_ddp_that_keeps_its_parameters_otherwise(one_process_group):
    strategy = OwnDDP(cluster_environment=LightningEnvironment())
    strategy._model = nn.Sequential(nn.Linear(2, 2))
    (problem,) = strategy_problems_of(strategy, EFMLoRA)
    for word in ("the strategy OwnDDP is a DDPStrategy, but its model, a Sequential, is no", "use strategy='ddp'"):
        assert word in problem
    (refused,) = monitor_problems(strategy)
    assert "OwnDDP is not supported" in refused
    strategy._model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    assert not strategy_problems_of(strategy, EFMLoRA)
    assert not monitor_problems(strategy)
    strategy.cluster_environment.set_world_size(2)  # but the group holds only one
    (problem,) = strategy_problems_of(strategy, EFMLoRA)
    assert "over all 2 ranks" in problem


def test_nemos_strategy_is_refused_however_it_wraps(one_process_group, monkeypatch):
    """Its class is just a DDPStrategy: only Megatron's parallel state gives it away."""
    state = SimpleNamespace(model_parallel_is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    strategy = OwnDDP(cluster_environment=LightningEnvironment())
    strategy._model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    (problem,) = strategy_problems_of(strategy, EFMLoRA)
    assert "Megatron is not supported" in problem
