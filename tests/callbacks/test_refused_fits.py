"""What can't work is refused before the first step, all of it in one message, and nothing was touched by then."""

from typing import Any

import pytest
import torch
from helpers import (
    Classifier,
    Losses,
    TwoPassClassifier,
    assert_no_trace,
    build,
    fit,
    make_loader,
    make_net,
    same,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import IterableDataset

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA, LearningRateRho, LinearRho

CALLBACKS = [EFMLoRA, FMLoRA]

# -- at the start of fit


def refused(
    tmp_path: Any, module: LightningModule, callbacks: list[Callback], loader: Any = None, **kwargs: Any
) -> str:
    """Fit, which must be refused before the first step with nothing touched; returns the message."""
    before = weights(module)
    classes = [type(m) for m in module.modules()]
    steps: list[int] = []
    module.inside.append(lambda module, batch_idx: steps.append(batch_idx))
    with pytest.raises(MisconfigurationException) as error:
        fit(tmp_path, module, callbacks, loader, **kwargs)
    assert not steps
    assert same(weights(module), before)
    assert [type(m) for m in module.modules()] == classes
    assert_no_trace(module)
    return str(error.value)


@pytest.mark.parametrize("front_end", ["efmlora", "fmlora", "module"])
def test_a_merged_adapter(tmp_path: Any, front_end: str) -> None:
    """It computes with its base alone; with another trained part beside it nothing would have failed."""
    module, callbacks, _ = build(front_end)
    module.net.merge_adapter()
    module.head = nn.Linear(3, 3)
    message = refused(tmp_path, module, callbacks)
    assert "the adapter is merged into its base, as in net.base_model.model." in message
    assert "unmerge_adapter() first" in message


class WithoutLoRA(Classifier):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)))


@pytest.mark.parametrize("callback", CALLBACKS)
def test_no_lora_layer(tmp_path, callback):
    message = refused(tmp_path, WithoutLoRA(), [callback(1.0)])
    for word in (callback.__name__, "no LoRA pair", "GELU", "Linear", "peft.get_peft_model"):
        assert word in message


@pytest.mark.parametrize("callback", CALLBACKS)
def test_every_b_frozen(tmp_path, callback):
    module = Classifier()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    message = refused(tmp_path, module, [callback(1.0)])
    assert "Every B is frozen" in message
    assert "default" in message


@pytest.mark.parametrize("callback", CALLBACKS)
def test_unknown_adapter(tmp_path, callback):
    net = make_net()
    net.add_adapter("second", net.peft_config["default"])
    message = refused(tmp_path, Classifier(net=net), [callback(1.0, adapter_name="third")])
    assert "adapter_name must be None or one of ['default', 'second'], got 'third'" in message


def test_unknown_adapter_of_a_module(tmp_path):
    message = refused(tmp_path, TwoPassClassifier(1.0, adapter_name="third"), [])
    assert "FMLoRAModule" in message
    assert "['default'], got 'third'" in message


@pytest.mark.parametrize("order", [1, -1])
def test_both_callbacks_at_once(tmp_path, order):
    message = refused(tmp_path, Classifier(), [EFMLoRA(1.0), FMLoRA(1.0)][::order])
    assert "EFMLoRA" in message
    assert "FMLoRA" in message.replace("EFMLoRA", "")
    assert "keep one" in message


def test_fmlora_beside_fmlora_module(tmp_path):
    message = refused(tmp_path, TwoPassClassifier(1.0), [FMLoRA(1.0)])
    assert "it perturbs the same weights as" in message
    assert "keep one" in message


def test_efmlora_beside_a_module_with_other_settings(tmp_path):
    """Every setting that differs, with both values."""
    module = TwoPassClassifier(1.0, estimator="projected", norm_scope="layer")
    message = refused(tmp_path, module, [EFMLoRA(2.0)])
    for name, own, other in (
        ("rho", "1.0", "2.0"),
        ("estimator", "projected", "average"),
        ("norm_scope", "layer", "global"),
    ):
        line = next(line for line in message.splitlines() if f" {name} must be the same" in line)
        assert own in line
        assert other in line


def test_efmlora_beside_a_module_that_would_schedule_too(tmp_path):
    message = refused(tmp_path, TwoPassClassifier(1.0, every_n_steps=2), [EFMLoRA(1.0)])
    assert "give start_step and every_n_steps to it" in message


def test_efmlora_beside_a_module_whose_ranks_have_their_own_perturbation(monkeypatch):
    trainer = trainer_of(".", [EFMLoRA(1.0)])
    module = TwoPassClassifier(1.0, sync_ascent=False)
    trainer.strategy.connect(module)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    problems = module._callback.configuration_problems(trainer, module)
    assert any("sync_ascent=False leaves each rank its own E" in problem for problem in problems)
    monkeypatch.setattr(type(trainer), "world_size", 1)
    assert not any("sync_ascent" in problem for problem in module._callback.configuration_problems(trainer, module))


class ByHand(Classifier):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False


def test_fmlora_with_manual_optimization(tmp_path):
    message = refused(tmp_path, ByHand(), [FMLoRA(1.0)])
    assert "manual optimization" in message
    assert "FMLoRAModule" in message
    assert "EFMLoRA" in message


class AFromB(ByHand):
    """An optimizer for the A factors and one for the rest."""

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        first = [p for name, p in trained.items() if "lora_A" in name]
        rest = [p for name, p in trained.items() if "lora_A" not in name]
        return [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(rest, lr=0.1)]


class Twice(ByHand):
    """Two optimizers that both hold everything."""

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.SGD(trained, lr=0.1), torch.optim.SGD(trained, lr=0.1)]


@pytest.mark.parametrize("module", [AFromB, Twice])
def test_pairs_spread_over_optimizers(tmp_path, module):
    message = refused(tmp_path, module(), [EFMLoRA(1.0)])
    assert "spread over optimizers [0, 1]" in message
    assert "one optimizer must hold A and B of all of them" in message


@pytest.mark.parametrize("left_out", ["0.lora_B", "0.lora_A", "lora"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_factors_in_no_optimizer(tmp_path, callback, left_out):
    class Partly(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for n, p in self.named_parameters() if p.requires_grad and left_out not in n])

    message = refused(tmp_path, Partly(), [callback(1.0)])
    assert "in no optimizer" in message
    if "B" in left_out:
        assert "net.base_model.model.0.lora_B.default.weight" in message


def test_module_with_two_optimizers(tmp_path):
    class Two(TwoPassClassifier):
        def configure_optimizers(self) -> Any:
            parameters = [p for p in self.parameters() if p.requires_grad]
            return [torch.optim.SGD(parameters[:-1], lr=0.1), torch.optim.SGD(parameters[-1:], lr=0.1)]

    assert "must return one optimizer, got 2" in refused(tmp_path, Two(1.0), [])


@pytest.mark.parametrize("callback", CALLBACKS)
def test_learning_rates_of_several_groups(tmp_path, callback):
    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD([{"params": trained[:2], "lr": 0.1}, {"params": trained[2:], "lr": 0.2}])

    message = refused(tmp_path, Groups(), [callback(LearningRateRho(1.0))])
    assert "several parameter groups" in message


class FromIterator(Losses, LightningModule):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


def test_fmlora_with_dataloader_iter(tmp_path):
    message = refused(tmp_path, FromIterator(), [FMLoRA(1.0)])
    assert "training_step(dataloader_iter)" in message
    assert "training_step(batch, batch_idx)" in message


# -- schedules over a run without end


class Endless(IterableDataset):
    """As long as one likes, and of no known length."""

    def __iter__(self) -> Any:
        yield from (sample for sample in make_loader(6).dataset)


def endless_loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Endless(), batch_size=4)


@pytest.mark.parametrize("schedule", [CosineRho(1.0, 0.0), LinearRho(1.0, 0.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("build", [EFMLoRA, FMLoRA, TwoPassClassifier])
def test_schedule_over_an_infinite_run(tmp_path, build, schedule):
    module, callbacks = (build(schedule), []) if build is TwoPassClassifier else (Classifier(), [build(schedule)])
    message = refused(tmp_path, module, callbacks, max_epochs=-1, max_steps=-1)
    assert type(schedule).__name__ in message
    for remedy in ("total_steps", "max_steps", "max_epochs"):
        assert remedy in message


@pytest.mark.parametrize("build", [EFMLoRA, FMLoRA, TwoPassClassifier])
def test_schedule_over_epochs_of_unknown_length(tmp_path, build):
    """Lightning estimates such a run at max_steps, which is -1 where it was not set."""
    schedule = CosineRho(1.0, 0.0)
    module, callbacks = (build(schedule), []) if build is TwoPassClassifier else (Classifier(), [build(schedule)])
    message = refused(tmp_path, module, callbacks, endless_loader(), max_epochs=1)
    assert "total_steps" in message


@pytest.mark.parametrize("settings", [{"total_steps": 4}, {}])
def test_schedule_with_an_end_of_its_own(tmp_path, settings):
    """total_steps, or the Trainer's max_steps, is enough."""
    callback = EFMLoRA(CosineRho(1.0, 0.5, **settings))
    fit(tmp_path, Classifier(), [callback], endless_loader(), max_epochs=1, **({} if settings else {"max_steps": 4}))
    assert callback.rho(4, callback.method.horizon) == pytest.approx(0.5)


# -- several at once


def test_several_problems_in_one_message(tmp_path):
    """Callback, module, adapter, optimizer and horizon are wrong together: one message, one line each."""
    callbacks = [FMLoRA(CosineRho(1.0, 0.0), adapter_name="third"), EFMLoRA(1.0)]
    message = refused(tmp_path, ByHand(), callbacks, max_epochs=-1)
    lines = message.splitlines()
    assert lines[0] == "FMLoRA: 4 problems"
    for words in ("keep one", "manual optimization", "adapter_name must be", "no end"):
        assert sum(words in line for line in lines[1:]) == 1, words


def test_a_refused_fit_can_be_repaired(tmp_path):
    """The same module and callback train once what was wrong is put right."""
    net = make_net()
    module, callback = Classifier(net=net), EFMLoRA(1.0)
    refused(tmp_path, module, [callback, FMLoRA(1.0)])
    module.inside.clear()
    trainer = trainer_of(tmp_path, [callback])
    trainer.fit(module, make_loader(), make_loader(1))
    assert callback.step == 12
    assert_no_trace(module)
