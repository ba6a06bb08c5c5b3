"""Several optimizers under manual optimization: each has its own step count, ball and average for its pairs."""

from typing import Any

import pytest
import torch
from helpers import assert_no_trace, fit, moved, same, weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import AdapterCheckpoint, CosineRho, EFMLoRA


class Pair(LightningModule):
    """Two LoRA networks that are trained against each other, each with its own optimizer."""

    def __init__(self, toggle: bool = False, adapters: tuple[str, str] = ("default", "default")) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.nets = nn.ModuleDict()
        for name, adapter in zip(("generator", "critic"), adapters, strict=True):
            config = LoraConfig(r=2, target_modules=["0"])
            self.nets[name] = get_peft_model(nn.Sequential(nn.Linear(6, 6)), config, adapter_name=adapter)
        self.reads: list[list[str]] = []

    def configure_optimizers(self) -> Any:
        optimizers = []
        for net in self.nets.values():
            trained = [p for p in net.parameters() if p.requires_grad]
            optimizers.append(torch.optim.AdamW(trained, lr=0.02))
        return optimizers

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, _, _ = batch
        generator, critic = self.nets.values()
        for i, (optimizer, sign) in enumerate(zip(self.optimizers(), (1, -1), strict=True)):
            if i == 0 and batch_idx % 2:
                continue  # the generator is stepped half as often
            if self.toggle:
                self.toggle_optimizer(optimizer)
            made = generator(inputs)
            loss = sign * (critic(made) - critic(inputs)).square().mean()
            self.reads.append([name for name, net in self.nets.items() if moved(net)])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("toggle", [False, True])
def test_one_callback_follows_the_pairs_of_each_optimizer(tmp_path, toggle):
    """The pairs of each optimizer have their own step count; toggled ones are read clean while the others learn."""
    torch.manual_seed(0)
    module, callback = Pair(toggle), EFMLoRA(0.1, estimator="projected", beta=1.0)
    fit(tmp_path, module, [callback], max_epochs=1)
    assert [course.step for course in callback.methods] == [3, 6]
    assert [len(course.pairs) for course in callback.methods] == [1, 1]
    for course in callback.methods:
        (pair,) = course.pairs
        (E,) = course.perturbation.state_dict()["E"].values()
        radius = float((pair.scaling * E @ pair.A.detach()).norm())
        assert 0 < radius < 0.11  # rho is 0.1, and A has moved by one step since E was taken
    both = ["generator", "critic"]
    if toggle:
        assert module.reads[:5] == [[], [], ["critic"], ["generator"], ["critic"]]
    else:
        assert module.reads == [[], ["generator"], *[both] * 7]
    assert_no_trace(module)


@pytest.mark.parametrize("callbacks", [1, 2])
def test_a_run_of_several_optimizers_is_resumed(tmp_path, callbacks):
    """With one callback for both, or one for each adapter; the file holds both states."""

    def run(ckpt_path: Any = None) -> Any:
        torch.manual_seed(0)
        module = Pair(adapters=("default", "default") if callbacks == 1 else ("gen", "crit"))
        names = [None] if callbacks == 1 else ["gen", "crit"]
        ours = [EFMLoRA(CosineRho(0.5, 0.1, total_steps=20), adapter_name=name) for name in names]
        saver = AdapterCheckpoint if callbacks == 1 else ModelCheckpoint
        saving = saver(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        fit(tmp_path, module, [*ours, saving], max_epochs=3, ckpt_path=ckpt_path)
        states = []
        for each in ours:
            states += [group.state_dict() for group in each.methods if group.pairs]
        return module, states

    whole = run()
    file = tmp_path / "epoch=1.ckpt"
    states = torch.load(file, weights_only=True)["callbacks"]
    assert len([key for key in states if "EFMLoRA" in key]) == callbacks
    resumed = run(file)
    assert same(weights(whole[0]), weights(resumed[0]))
    assert same(whole[1], resumed[1])
    assert [state["step"] for state in whole[1]] == [9, 18]


def test_one_callback_for_both_equals_one_for_each_adapter(tmp_path):
    """If each optimizer holds the pairs of one adapter, the two ways give the same run."""
    ends = []
    for names in ([None], ["gen", "crit"]):
        torch.manual_seed(0)
        module = Pair(adapters=("gen", "crit"))
        fit(tmp_path, module, [EFMLoRA(0.5, adapter_name=name) for name in names], max_epochs=1)
        ends.append(weights(module))
    assert same(*ends)


class OneForBoth(Pair):
    """The same networks with a single optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.nets["critic"](self.nets["generator"](batch[0])).square().mean())
        optimizer.step()


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        (Pair, OneForBoth, "checkpoint has 2 optimizers, this run 1: configure as many"),
        (OneForBoth, Pair, "perturbation is of other pairs.*in the checkpoint but not in the model"),
    ],
)
def test_another_number_of_optimizers_is_refused(tmp_path, saved, resumed, message):
    """Lightning restores as many states as it finds optimizers for, and ours would be lost silently."""
    file = tmp_path / "file.ckpt"
    fit(tmp_path, saved(), [EFMLoRA(0.5)], max_epochs=1).save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["optimizer_states"] = []
    torch.save(checkpoint, file)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, resumed(), [EFMLoRA(0.5)], ckpt_path=file)
