"""Pairs may freeze, unfreeze and be added during a fit: only those that are learning are perturbed.

A fit whose pairs never have a gradient perturbs nothing, and says so.
"""

import re
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    FRONT_ENDS,
    At,
    Classifier,
    E_hat,
    assert_no_trace,
    build,
    fit,
    make_net,
    moved,
    same,
    trains,
    two_adapters,
    weights,
    with_own,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from monitored_runs import measured
from peft import LoraConfig
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FlatnessMonitor, FMLoRA
from lightning_flatlora.baselines import BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation


class Watching:
    """Notes which layers read a perturbed weight in each training_step."""

    def __init__(self, module: Any) -> None:
        self.moved: list[list[str]] = []
        module.inside.append(lambda module, _: self.moved.append(moved(module)))


def freeze(module: Any, trained: bool = False, layers: str = "") -> None:
    for name, p in module.named_parameters():
        if "lora" in name and layers in name:
            p.requires_grad_(trained)
            p.grad = None


ALL = ["0.default", "2.default", "4.default"]
ALL_IN_OPTIMIZER = trains(lambda name, parameter: "lora" in name or parameter.requires_grad)
"""Also the factors of adapters that come to be active later."""
HEAD_ONLY = trains(lambda name, parameter: parameter.requires_grad and "lora" not in name)
OTHERS = [LoRASAM, RandomPerturbation, BiLoRA, BalancednessRegularization]


def test_pairs_that_stop_learning_are_read_clean(tmp_path):
    """First one, then all; when they learn again, their last perturbation is read at once."""
    module = Classifier()
    watching = Watching(module)
    changes = [At(3, lambda module: freeze(module, layers=".2.")), At(5, freeze), At(8, lambda m: freeze(m, True))]
    fit(tmp_path, module, [EFMLoRA(0.5), *changes])
    assert watching.moved == [[], ALL, ALL, *[["0.default", "4.default"]] * 2, *[[]] * 3, *[ALL] * 4]
    assert_no_trace(module)


def test_an_adapter_made_active_in_mid_fit_is_perturbed(tmp_path):
    """In a hook of the module, which runs after the callbacks' hooks."""
    module, callback = with_own(ALL_IN_OPTIMIZER)[0](net=two_adapters()), EFMLoRA(0.5)
    watching = Watching(module)
    change_at = At(3, lambda module: module.net.base_model.set_adapter("other"))
    module.on_train_batch_start = lambda batch, batch_idx: change_at.on_train_batch_start(None, module)
    fit(tmp_path, module, [callback], max_epochs=1)
    others = [name.replace("default", "other") for name in ALL]
    assert watching.moved == [[], ALL, ALL, [], others, others]
    assert len(E_hat(callback)) == 6
    assert_no_trace(module)


def test_an_adapter_added_in_mid_fit_is_perturbed(tmp_path):
    """With its own parameter group; the search at the start of an epoch also finds new layers."""
    module, callback = Classifier(), EFMLoRA(0.5)
    watching = Watching(module)

    class Add(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
                pl_module.net.base_model.set_adapter(["default", "other"])
                new = [p for n, p in pl_module.named_parameters() if ".other." in n]
                trainer.optimizers[0].add_param_group({"params": new})

    fit(tmp_path, module, [callback, Add()])
    assert watching.moved[6:] == [ALL, *[["0.default", "0.other", "2.default", "4.default"]] * 5]


class Unfreeze(BaseFinetuning):
    """As in Lightning's documentation: LoRA is frozen for an epoch; then all or part of it joins the optimizer."""

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self.part = part

    def freeze_before_training(self, pl_module: Any) -> None:
        freeze(pl_module)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            freeze(pl_module, True)
            new = [p for name, p in pl_module.named_parameters() if "lora" in name and self.part in name]
            optimizer.add_param_group({"params": new})


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA, *OTHERS])
def test_finetuning_that_unfreezes_later(tmp_path, callback):
    """It starts, warns at the end of the first epoch that nothing was perturbed, and perturbs from the second on."""
    module, plain, ours = Classifier(), Classifier(), callback(0.5)
    watching = Watching(module)
    with pytest.warns(UserWarning, match="no pair is trained now") as warned:
        fit(tmp_path, module, [ours, Unfreeze()])
    assert len([each for each in warned if "no pair" in str(each.message)]) == 1
    assert ours.step == 12
    if callback is EFMLoRA:  # perturbed after the first refresh, in the first step that trains the pairs
        assert watching.moved == [*[[]] * 7, *[ALL] * 5]
    fit(tmp_path, plain, [Unfreeze()])
    assert not same(weights(module), weights(plain))
    assert_no_trace(module)


class Joins(Unfreeze):
    """Freezes nothing, so that the factors only join the optimizer later."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pass


@pytest.mark.parametrize(("callback", "part"), [(EFMLoRA, ""), *product([EFMLoRA, *OTHERS], [".2."])])
def test_factors_that_join_the_optimizer_later(tmp_path, callback, part):
    """Factors that never join are reported at the end."""
    module, ours = with_own(HEAD_ONLY)[0](), callback(0.5)
    watching = Watching(module)
    with pytest.warns(UserWarning, match=callback.__name__) as warned:
        fit(tmp_path, module, [ours, Joins(part)])
    if callback is EFMLoRA:
        assert watching.moved == [*[[]] * 7, *[["2.default"] if part else ALL] * 5]
    if callback is BiLoRA:  # no other layer's auxiliary pair has climbed
        auxiliary = ours.state_dict()["auxiliary"]
        assert [name for name, pair in auxiliary.items() if pair["B"].any()] == ["net.base_model.model.2"]
    left = "2 pairs, .* came into no optimizer and were not perturbed"
    assert len([each for each in warned if re.search(left, str(each.message))]) == bool(part)
    assert_no_trace(module)


def test_an_adapter_that_no_optimizer_holds_is_said(tmp_path):
    change = At(3, lambda module: module.net.set_adapter("other"))
    with pytest.warns(UserWarning, match="such as .*other.*, are in no optimizer.* Until then these pairs are not"):
        fit(tmp_path, Classifier(net=two_adapters()), [EFMLoRA(0.5), change])


class Referring(Classifier):
    """LoRA-FA with a reference pass, after which peft lets A require a gradient that no optimizer clears."""

    refers = True

    def on_train_batch_start(self, *args: Any) -> None:
        if self.refers:
            with self.net.disable_adapter(), torch.no_grad():
                self.net(torch.ones(1, 6))


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA, LoRASAM, BiLoRA])
def test_a_pass_without_the_adapter_leaves_a_frozen_a_frozen(tmp_path, callback):
    ends = []
    for refers in (False, True):
        module, ours = Referring(), callback(0.5)
        module.refers = refers
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        fit(tmp_path, module, [ours], max_epochs=3)
        ends.append([weights(module), ours.state_dict()])
    assert same(*ends)


def test_the_monitor_measures_a_fixed_a_as_the_method_trains_it(tmp_path):
    """The reference pass comes before each measurement, and lets A require a gradient."""
    rows = []
    for refers in (False, True):
        module = Referring()
        module.refers = refers
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        rows.append(measured(tmp_path, module, [EFMLoRA(0.5), FlatnessMonitor(rho=0.5, every_n_steps=2)]))
    assert len(rows[0]) == 6
    assert same(*rows)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_unfreezes_is_resumed(tmp_path, epoch):
    """From before and after: the average waits in the file, and then in the callback, until its pairs are trained."""

    class UnfreezeFrom(Unfreeze):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, epoch, optimizer)
            if epoch > 1:  # Lightning freezes again when it resumes
                freeze(pl_module, True)

    def run(ckpt_path: Any = None) -> Any:
        module, callback = Classifier(), EFMLoRA(0.5)
        saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no pair is trained now")
            fit(tmp_path, module, [callback, UnfreezeFrom(), saving], max_epochs=3, ckpt_path=ckpt_path)
        return weights(module), E_hat(callback), callback.step

    assert same(run(), run(tmp_path / f"epoch={epoch}.ckpt"))


class BothInAStep(trains(lambda name, parameter: "lora" in name)):  # type: ignore[misc]
    """Activates one adapter and then the other, within training_step."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self
        losses = []
        for adapter in ("default", "other"):
            module.net.set_adapter(adapter)
            losses.append(super().loss(batch, batch_idx))  # type: ignore[misc]
        # peft has frozen the first one again, so its gradient would be lost.
        for name, parameter in module.net.named_parameters():
            parameter.requires_grad_("lora" in name)
        return losses[0] + losses[1]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("first", ["default", "other"])
def test_an_adapter_that_only_the_step_activates_is_perturbed_from_its_second_step_on(
    tmp_path: Any, front_end: str, first: str
) -> None:
    net = two_adapters()
    net.set_adapter(first)
    module, callbacks, kwargs = build(front_end, net=net, own=BothInAStep)
    perturbed: set[tuple[int, str]] = set()

    def look(module: Any, batch_idx: int) -> None:
        if f"0.{net.active_adapter}" in moved(module):
            perturbed.add((batch_idx, net.active_adapter))

    module.inside.append(look)
    fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    assert perturbed >= set(product(range(1, 6), ("default", "other")))


class Detached(nn.Module):
    """A trained head on the features of adapted layers, which run under no_grad by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.head = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.net(x)
        return self.head(features)


class Late(Detached):
    """The adapters join after some steps, like the layers in a staged fine-tuning."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 3:
            return super().forward(x)
        return self.head(self.net(x))


CASES = [
    *product([*FRONT_ENDS, "LoRASAM", "nBAR", "RandomPerturbation", "BiLoRA"], [Detached]),
    *product(["efmlora", "module"], [Late]),
]


@pytest.mark.parametrize(("front_end", "case"), CASES)
def test_a_fit_without_gradients_says_it_once(tmp_path: Any, front_end: str, case: Any) -> None:
    """Gradients that come later are no reason for another warning."""
    module, callbacks, kwargs = build(front_end, net=case())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, module, callbacks, **kwargs)
    said = [each for each in warned if "no pair's B has had a gradient so far" in str(each.message)]
    assert len(said) == (case is not Late)
