"""The model may change in mid-fit: what stops learning is read clean, what starts is perturbed, scalings count."""

import warnings
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    Classifier,
    E_hat,
    TwoPassClassifier,
    assert_no_trace,
    fit,
    make_net,
    same,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, FlatnessMonitor, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, LoRASAM, RandomPerturbation


class At(Callback):
    """Changes the model at the start of one batch, counted over the whole fit."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change, self.seen = step, change, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.seen == self.step:
            self.change(pl_module)
        self.seen += 1


def moved(module: nn.Module) -> list[str]:
    """The adapters and layers that read another weight than the stored one at this moment."""
    names = []
    for name, part in module.named_modules():
        if ".lora_B." in name and not torch.equal(part.weight, part._parameters["weight"]):
            names.append(".".join(name.split(".")[-3::2]))
    return names


class Watching:
    """Notes what reads another weight in every training_step."""

    def __init__(self, module: Any) -> None:
        self.moved: list[list[str]] = []
        module.inside.append(lambda module, _: self.moved.append(moved(module)))


def freeze(module: Any, trained: bool = False, layers: str = "") -> None:
    for name, p in module.named_parameters():
        if "lora" in name and layers in name:
            p.requires_grad_(trained)
            p.grad = None


ALL = ["0.default", "2.default", "4.default"]


@pytest.mark.parametrize("how", ["frozen", "cut"])
def test_pairs_that_stop_learning_are_read_clean(tmp_path, how, monkeypatch):
    """Frozen, or cut off from the loss for long: the run is then plain LoRA's, and when they learn again it is not."""
    monkeypatch.setattr("lightning_flatlora.perturbation._LONGEST_REST", 2)
    module, callback = Classifier(), EFMLoRA(0.5)
    watching = Watching(module)
    if how == "frozen":
        changes = [At(3, freeze), At(8, lambda module: freeze(module, True))]
        clean = slice(3, 9)
    else:
        head = module.net.base_model.model[4].base_layer
        cut = {"on": False}
        loss = module.loss

        def loss_of_head(batch: Any, batch_idx: int) -> Tensor:
            whole = loss(batch, batch_idx)
            return head.bias.square().sum() + 0 * whole.detach() if cut["on"] else whole

        module.loss = loss_of_head
        changes = [At(3, lambda _: cut.update(on=True)), At(8, lambda _: cut.update(on=False))]
        clean = slice(5, 9)  # the second step without a gradient tells
    fit(tmp_path, module, [callback, *changes])
    if how == "frozen":  # what was known before is read at once
        assert watching.moved[8] == ALL
        clean = slice(3, 8)
    assert watching.moved[:3] == [[], ALL, ALL]
    assert not any(watching.moved[clean])
    assert watching.moved[9:] == [ALL] * 3
    assert_no_trace(module)


def test_a_frozen_layer_is_read_clean_and_the_others_are_not(tmp_path):
    module = Classifier()
    watching = Watching(module)
    fit(tmp_path, module, [EFMLoRA(0.5), At(3, lambda module: freeze(module, layers=".2."))], max_epochs=1)
    assert watching.moved == [[], ALL, ALL, *[["0.default", "4.default"]] * 3]


def two_adapters() -> Any:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"]))
    return net


class AllInOptimizer(Classifier):
    """The optimizer holds all factors, also those of adapters that come to be active later."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for n, p in self.named_parameters() if "lora" in n or p.requires_grad], lr=0.02)


@pytest.mark.parametrize("in_hook_of", ["callback", "module"])
def test_an_adapter_made_active_in_mid_fit_is_perturbed(tmp_path, in_hook_of):
    module, callback = AllInOptimizer(net=two_adapters()), EFMLoRA(0.5)
    watching = Watching(module)

    def change(module: Any) -> None:
        module.net.base_model.set_adapter("other")

    change_at = At(3, change)
    if in_hook_of == "module":  # its hooks come after the callbacks'
        module.on_train_batch_start = lambda batch, batch_idx: change_at.on_train_batch_start(None, module)
    fit(tmp_path, module, [callback, *([change_at] if in_hook_of == "callback" else [])], max_epochs=1)
    others = [name.replace("default", "other") for name in ALL]
    assert watching.moved == [[], ALL, ALL, [], others, others]
    assert len(E_hat(callback)) == 6
    assert_no_trace(module)


def test_adapters_that_take_turns_keep_their_perturbations(tmp_path):
    module = AllInOptimizer(net=two_adapters())
    watching = Watching(module)
    turns = [
        At(i, lambda module, name=name: module.net.set_adapter(name)) for i, name in enumerate(["other", "default"] * 3)
    ]
    fit(tmp_path, module, [EFMLoRA(0.5), *turns], max_epochs=1)
    others = [name.replace("default", "other") for name in ALL]
    assert watching.moved == [[], [], others, ALL, others, ALL]


def test_an_adapter_added_in_mid_fit_is_perturbed(tmp_path):
    """With a parameter group of its own; the walk at an epoch's start finds new layers, too."""
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
    """As Lightning's documentation shows: all of LoRA is frozen for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        freeze(pl_module)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            freeze(pl_module, True)
            optimizer.add_param_group({"params": [p for n, p in pl_module.named_parameters() if "lora" in n]})


class TrainedOnly(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA, LoRASAM, RandomPerturbation, BalancednessRegularization])
def test_finetuning_that_unfreezes_later(tmp_path, callback):
    """It starts, says at the end of the first epoch that nothing was perturbed, and perturbs from the second on."""
    runs = []
    for callbacks in ([callback(0.5)], []):
        module = TrainedOnly()
        if callbacks:
            with pytest.warns(UserWarning, match="no pair has been trained so far") as warned:
                fit(tmp_path, module, [*callbacks, Unfreeze()])
            assert len([each for each in warned if "no pair" in str(each.message)]) == 1
            assert callbacks[0].step == 12
        else:
            fit(tmp_path, module, [Unfreeze()])
        assert_no_trace(module)
        runs.append(weights(module))
    assert not same(*runs)


def test_unfrozen_pairs_are_perturbed_from_their_first_refresh_on(tmp_path):
    """It is the step that they are first trained in; the next one reads them perturbed."""
    module, callback = TrainedOnly(), EFMLoRA(0.5)
    watching = Watching(module)
    with pytest.warns(UserWarning, match="no pair has been trained so far"):
        fit(tmp_path, module, [callback, Unfreeze()])
    assert watching.moved == [*[[]] * 7, *[ALL] * 5]


class Joins(BaseFinetuning):
    """Nothing is frozen; LoRA joins the optimizer in the second epoch, or a part of it."""

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self.part = part

    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            new = [p for name, p in pl_module.named_parameters() if "lora" in name and self.part in name]
            optimizer.add_param_group({"params": new})


class HeadOnly(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for n, p in self.named_parameters() if p.requires_grad and "lora" not in n])


@pytest.mark.parametrize("part", ["", ".2."])
def test_factors_that_join_the_optimizer_later(tmp_path, part):
    """What never joins is said at the end."""
    module = HeadOnly()
    watching = Watching(module)
    with pytest.warns(UserWarning, match="EFMLoRA") as warned:
        fit(tmp_path, module, [EFMLoRA(0.5), Joins(part)])
    assert watching.moved == [*[[]] * 7, *[["2.default"] if part else ALL] * 5]
    assert len([each for each in warned if "2 pairs" in str(each.message)]) == bool(part)


def test_an_adapter_that_no_optimizer_holds_is_said(tmp_path):
    change = At(3, lambda module: module.net.set_adapter("other"))
    with pytest.warns(UserWarning, match="in no optimizer, as .*other.* Until then these pairs are not perturbed"):
        fit(tmp_path, TrainedOnly(net=two_adapters()), [EFMLoRA(0.5), change], max_epochs=1)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_unfreezes_is_resumed(tmp_path, epoch):
    """From before and after: the average waits in the file, and in the callback, until its pairs are trained."""

    class UnfreezeFrom(Unfreeze):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, epoch, optimizer)
            if epoch > 1:  # Lightning freezes again when it resumes
                freeze(pl_module, True)

    def run(ckpt_path: Any = None) -> Any:
        module, callback = TrainedOnly(), EFMLoRA(0.5)
        saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no pair has been trained")
            fit(tmp_path, module, [callback, UnfreezeFrom(), saving], max_epochs=3, ckpt_path=ckpt_path)
        return weights(module), E_hat(callback), callback.step

    assert same(run(), run(tmp_path / f"epoch={epoch}.ckpt"))


class Never(Unfreeze):
    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        pass


def test_pairs_that_never_come_are_said_once(tmp_path):
    with pytest.warns(UserWarning, match="EFMLoRA: no pair has been trained so far") as warned:
        fit(tmp_path, TrainedOnly(), [EFMLoRA(0.5), Never()])
    assert len([each for each in warned if "no pair" in str(each.message)]) == 1


# -- scaling


class Radius(Callback):
    """The radius of the fresh perturbation in full weight space at each step; beta=1 keeps it alone."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.radii = callback, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaling = {n: m.scaling["default"] for n, m in pl_module.named_modules() if hasattr(m, "scaling")}
        total = torch.zeros(())
        for pair in self.callback.search.pairs:
            E = E_hat(self.callback)[pair.name]
            total += (scaling[pair.name.removesuffix(".lora_B.default.weight")] * E @ pair.A).detach().square().sum()
        self.radii.append(float(total.sqrt()))


@pytest.mark.parametrize("in_step", [False, True])
def test_a_scaling_changed_in_mid_fit_leaves_the_radius(tmp_path, in_step):
    module = Classifier()
    callback = EFMLoRA(0.5, beta=1.0, estimator="projected")
    radius = Radius(callback)

    def change(module: Any, *_: Any) -> None:
        for part in module.modules():
            if hasattr(part, "set_scale"):
                part.set_scale("default", 10.0)

    if in_step:
        module.inside.append(lambda module, batch_idx: change(module) if batch_idx == 3 else None)
    fit(tmp_path, module, [callback, radius, *([] if in_step else [At(3, change)])], max_epochs=1)
    assert radius.radii == pytest.approx([0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("callback", [FMLoRA, EFMLoRA])
def test_a_scaling_of_zero_leaves_its_layer_out(tmp_path, callback):
    """One layer that is switched off so must not make every perturbation vanish."""
    module, ours = Classifier(), callback(0.5)
    change = At(2, lambda module: module.net.base_model.model[2].set_scale("default", 0.0))
    fit(tmp_path, module, [ours, change], max_epochs=1)
    assert all(E.isfinite().all() for E in E_hat(ours).values())
    assert sum(bool(E.any()) for name, E in E_hat(ours).items() if ".2." not in name) == 2


class Averages(Callback):
    """Ê of every pair after each batch."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(E_hat(self.callback))


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("layers", [[2], [0, 2, 4]])
def test_a_scaling_of_zero_lets_a_pair_rest(tmp_path, layers, in_step):
    """One pair, or all of them: Ê stays until the scaling comes back, and then counts with the new one."""
    module, ours = Classifier(), EFMLoRA(0.5)
    averages = Averages(ours)

    def change(module: Any, batch_idx: int) -> None:
        scaling = {2: 0.0, 4: 2.0}.get(batch_idx)
        for layer in layers if scaling is not None else []:
            module.net.base_model.model[layer].set_scale("default", scaling)

    if in_step:
        loss = module.loss

        def loss_after_change(batch: Any, batch_idx: int) -> Tensor:
            change(module, batch_idx)
            return loss(batch, batch_idx)

        module.loss = loss_after_change
    else:
        module.on_train_batch_start = lambda batch, batch_idx: change(module, batch_idx)
    fit(tmp_path, module, [ours, averages], max_epochs=1)
    names = [f"net.base_model.model.{layer}.lora_B.default.weight" for layer in layers]
    for name in names:
        assert averages.seen[1][name].any()
        assert torch.equal(averages.seen[3][name], averages.seen[1][name])
        assert not torch.equal(averages.seen[4][name], averages.seen[3][name])
    assert_no_trace(module)


class Experts(nn.Module):
    """Two layers that take turns, as experts of a router."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(2)])
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return self.experts[self.turn % 2](x)


def test_layers_that_are_used_in_turn_are_perturbed(tmp_path):
    """Each is read perturbed from its second turn on, and keeps its average while the other one learns."""
    torch.manual_seed(0)
    net = get_peft_model(Experts(), LoraConfig(r=2, target_modules=["0", "1"]))
    module, ours = Classifier(net=net), EFMLoRA(0.5)
    watching, averages = Watching(module), Averages(ours)
    fit(tmp_path, module, [ours, averages], max_epochs=1)
    assert watching.moved == [[], ["1.default"], *[["0.default", "1.default"]] * 4]
    first, second = sorted(averages.seen[0])
    for step in range(2, 6):
        rests, moves = (second, first) if step % 2 else (first, second)
        assert torch.equal(averages.seen[step][rests], averages.seen[step - 1][rests])
        assert not torch.equal(averages.seen[step][moves], averages.seen[step - 1][moves])


def test_a_changed_scaling_reaches_a_module_of_two_passes(tmp_path):
    module = TwoPassClassifier(0.5)
    fit(
        tmp_path, module, [At(2, lambda module: module.net.base_model.model[2].set_scale("default", 3.0))], max_epochs=1
    )
    assert sorted(pair.scaling for pair in module._driver.perturbation.pairs) == [2.0, 2.0, 6.0]


# -- beside other callbacks


class Measured(Callback):
    """The scalings that a monitor before it has measured with, by the step."""

    def __init__(self, monitor: Any) -> None:
        self.monitor, self.scalings = monitor, {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.monitor._measured and trainer.global_step % 3 == 0:
            self.scalings[trainer.global_step] = sorted(pair.scaling for pair in self.monitor._perturbation.pairs)


def test_the_monitor_follows_too(tmp_path):
    """It measures as soon as there is a pair, with the scaling of the moment."""
    module, monitor = TrainedOnly(), FlatnessMonitor(rho=0.5, every_n_steps=3)
    measured = Measured(monitor)
    scale = At(10, lambda module: module.net.base_model.model[2].set_scale("default", 3.0))
    fit(tmp_path, module, [monitor, measured, Unfreeze(), scale])
    assert measured.scalings == {9: [2.0, 2.0, 2.0], 12: [2.0, 2.0, 6.0]}


def test_the_monitor_sees_a_layer_that_was_put_in(tmp_path):
    """LoRA that comes at an epoch's start is measured in that epoch."""

    class PutsIn(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                net = nn.Sequential(nn.Linear(CLASSES, CLASSES))
                layers = pl_module.net.base_model.model
                layers.append(get_peft_model(net, LoraConfig(r=2, target_modules=["0"])))

    monitor = FlatnessMonitor(rho=0.5, every_n_steps=3)
    measured = Measured(monitor)
    fit(tmp_path, Classifier(), [PutsIn(), monitor, measured])
    assert [len(scalings) for scalings in measured.scalings.values()] == [3, 3, 4, 4]


def test_sam_moves_what_joins_the_optimizer_later(tmp_path):
    module, sam = TrainedOnly(), SAM(0.1)
    fit(tmp_path, module, [sam, Unfreeze()])
    assert len(sam._trained) == 7


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA, LoRASAM])
def test_pairs_that_came_before_the_first_refresh_are_not_missed(tmp_path, callback):
    """No warning: they were unfrozen, though no step has perturbed them yet."""
    unfreeze = At(2, lambda module: freeze(module, True))
    fit(tmp_path, AllInOptimizer(), [callback(0.5, start_step=100), Never(), unfreeze], max_epochs=1)
