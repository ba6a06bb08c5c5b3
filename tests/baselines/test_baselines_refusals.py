"""What the baselines refuse: values, models, optimizers and strategies that can't work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import BASELINES, ByHand, Classifier, TwoPassClassifier, assert_no_trace, fit, make_net, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation
from lightning_flatlora.callbacks.base import MethodCallback


def refused(tmp_path: Path, module: Any, callbacks: list[Callback], **kwargs: Any) -> str:
    before = weights(module)
    with pytest.raises(MisconfigurationException) as error:
        fit(tmp_path, module, callbacks, **kwargs)
    assert same(weights(module), before)
    assert_no_trace(module)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(-1), "SAM: rho must be a finite number >= 0 or a RhoSchedule, got -1"),
        (lambda: LoRASAM(0.1, every_n_steps=0), "LoRASAM: every_n_steps must be an integer >= 1, got 0"),
        (lambda: RandomPerturbation("a"), "RandomPerturbation: sigma must be a finite number >= 0 or a RhoSchedule"),
        (lambda: RandomPerturbation(0.1, seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: BalancednessRegularization(None), "alpha must be a finite number >= 0 or a RhoSchedule, got None"),
        (lambda: BalancednessRegularization(1, "xBAR"), "kind must be 'nBAR' or 'oBAR', got 'xBAR'"),
        (lambda: BalancednessRegularization(-1, 3, adapter_name=2), "BalancednessRegularization: 3 problems"),
        (lambda: BiLoRA(0.1, step_size=0), "BiLoRA: step_size must be a finite number > 0, got 0"),
        (lambda: BiLoRA(0.1, step_size=float("inf")), "step_size must be a finite number > 0, got inf"),
        (lambda: BiLoRA(0.1, rank=0), "rank must be an integer >= 1, got 0"),
        (lambda: BiLoRA(-1, step_size="a", rank=1.5, seed=-1), "BiLoRA: 4 problems"),
    ],
)
def test_values(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


@pytest.mark.parametrize("name", ["SAM", "LoRASAM"])
def test_two_passes_need_automatic_optimization(tmp_path: Path, name: str) -> None:
    assert "a second pass can't be put into a training_step" in refused(tmp_path, ByHand(), [BASELINES[name](0.1)])


@pytest.mark.parametrize("name", BASELINES)
def test_one_method_at_a_time(tmp_path: Path, name: str) -> None:
    for other in (EFMLoRA, FMLoRA):
        message = refused(tmp_path, Classifier(), [BASELINES[name](0.1), other(0.1)])
        assert "keep one" in message
        assert other.__name__ in message
    assert "keep one" in refused(tmp_path, TwoPassClassifier(0.1), [BASELINES[name](0.1)])


def test_sam_needs_one_optimizer_that_trains(tmp_path: Path) -> None:
    class Two(ByHand):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], 0.1) for p in self.parameters() if p.requires_grad][:2]

    assert "must return one optimizer, got 2" in refused(tmp_path, Two(), [SAM(0.1)])

    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if not p.requires_grad], 0.1)

    assert "holds no parameter that is trained" in refused(tmp_path, Frozen(), [SAM(0.1)])


def test_a_frozen_A_can_not_be_balanced(tmp_path: Path) -> None:
    module = Classifier()
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_A" not in name)
    message = refused(tmp_path, module, [BalancednessRegularization(1.0)])
    assert "A of 3 pairs is frozen, as beside net.base_model.model.0.lora_B.default.weight" in message


def test_lora_sam_leaves_a_frozen_A(tmp_path: Path) -> None:
    module = Classifier()
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_A" not in name)
    before = weights(module)
    fit(tmp_path, module, [LoRASAM(0.5)])
    assert all(same(v, before[n]) for n, v in weights(module).items() if "lora_A" in n)


@pytest.mark.parametrize("name", ["RandomPerturbation", "BiLoRA"])
def test_no_layer_with_a_whole_weight(tmp_path: Path, name: str) -> None:
    module = Classifier()
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    module.net = get_peft_model(nn.Sequential(nn.Linear(6, 3)), config)
    assert "no LoRA layer on a Linear" in refused(tmp_path, module, [BASELINES[name](0.1)])


@pytest.mark.parametrize("name", ["SAM", "nBAR", "RandomPerturbation", "BiLoRA"])
def test_shards_are_refused(name: str) -> None:
    callback = BASELINES[name](0.1)
    assert not callback.works_sharded
    assert LoRASAM(0.1).works_sharded

    strategy = FSDPStrategy(accelerator=L.pytorch.accelerators.CPUAccelerator())
    trainer: Any = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1, callbacks=[], optimizers=[])
    problems = MethodCallback.configuration_problems(callback, trainer, Classifier())
    assert problems == [
        "FSDPStrategy leaves each rank a part of every weight, and this method needs them whole: use strategy='ddp'"
    ]


@pytest.mark.parametrize("name", ["SAM", "LoRASAM", "nBAR"])
def test_sixteen_bits_are_warned_of(tmp_path: Path, name: str) -> None:
    module = Classifier(net=make_net().bfloat16())
    with pytest.warns(UserWarning, match=r"kept in torch.bfloat16.*bf16-mixed"):
        fit(tmp_path, module, [BASELINES[name](0.5)], precision="bf16-true", max_epochs=1)
