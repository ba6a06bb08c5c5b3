"""Modules as other people write them train, save and resume unchanged.

Each class below imitates the structure of a kind of public project with peft and Lightning: where it freezes, how many
optimizers it has, who injects LoRA. Each is trained in one go, and again from the file of
its first epoch, in a module built anew as another process would build it. Both must end in the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import ResumableLoader, assert_no_trace, make_loader, make_net, needs_weight_averaging, same, weights
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import BaseFinetuning
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA

EPOCHS = 3


class Plain(L.LightningModule):
    """A LoRA classifier as in the quick start of every project."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


class FreezesInConfigureOptimizers(Plain):
    """Decides there, and not earlier, what is trained, as NeMo's speech language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)  # drawn at random, frozen below, and so in no loader's gift
        self.net.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, factor = batch
        return super().training_step((self.encoder(inputs), labels, factor), batch_idx)

    def configure_optimizers(self) -> Any:
        self.encoder.requires_grad_(False)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return super().configure_optimizers()


class Adversaries(L.LightningModule):
    """A generator and a discriminator, a LoRA and an optimizer each, stepped in turn by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = make_net(seed=0)
        self.discriminator = make_net(seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels, _ = batch
        for optimizer, net in zip(self.optimizers(), (self.generator, self.discriminator), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(inputs), labels))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = []
        for net in (self.generator, self.discriminator):
            trained = [p for p in net.parameters() if p.requires_grad]
            optimizers.append(torch.optim.AdamW(trained, lr=0.02))
        return optimizers


class AddsAdapter(Plain):
    """LoRA by transformers' own add_adapter, without a PeftModel; the new head trains too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        self.net = BertForSequenceClassification(BertConfig(vocab_size=16, num_labels=3, **sizes))
        self.net.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
        self.net.classifier.requires_grad_(True)
        self.net.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        torch.manual_seed(batch_idx)  # Lightning restores no generator, and this network has dropout
        return self.net(input_ids=(inputs.abs() * 5).long().clamp(max=15), labels=labels).loss


class FromHydra(Plain):
    """Its LoraConfig holds the lists of a configuration library, which are not Python's lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        node = OmegaConf.create({"r": 2, "target_modules": ["0", "2"], "rank_pattern": {"0": 3}})
        net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.net = get_peft_model(net, LoraConfig(**node))


class WithHead(Plain):
    """A head that a callback unfreezes later."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        return nn.functional.cross_entropy(self.head(self.net(inputs)), labels)


class UnfreezesLater(BaseFinetuning):
    """The head learns from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pl_module.head.requires_grad_(False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.head, optimizer, lr=0.01)


@dataclass
class Project:
    """What a project brings to the Trainer.

    Attributes:
        module: makes it anew, as another process would.
        callbacks: makes its own callbacks.
        methods: the callbacks of this package that work there.
        marks: of the project's cases.
    """

    module: Callable[[], Any]
    callbacks: Callable[[], list[Any]] = list
    methods: Sequence[Any] = (EFMLoRA, FMLoRA)
    marks: Sequence[pytest.MarkDecorator] = ()


PROJECTS = {
    "freezes in configure_optimizers": Project(FreezesInConfigureOptimizers),
    "two optimizers": Project(Adversaries, methods=(EFMLoRA,)),
    "add_adapter": Project(AddsAdapter),
    "Hydra": Project(FromHydra),
    "gradual unfreezing": Project(WithHead, callbacks=lambda: [UnfreezesLater()]),
    "moving average of weights": Project(
        Plain, callbacks=lambda: [lightnings.EMAWeightAveraging(decay=0.5)], marks=(needs_weight_averaging,)
    ),
}
CASES = []
for title, each in PROJECTS.items():
    for kind in each.methods:
        CASES.append(pytest.param(each, kind, id=f"{title}, {kind.__name__}", marks=each.marks))


def train(project: Project, method: Any, path: Path, name: str, resume: Path | None = None) -> Any:
    """Fit a project's module, save under a name after each epoch, and return the Trainer."""
    torch.manual_seed(0)
    module = project.module()
    files = {"save_top_k": -1, "filename": f"{name}-{{epoch}}", "auto_insert_metric_name": False}
    callbacks = [method, *project.callbacks(), AdapterCheckpoint(path, **files)]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=callbacks,
    )
    trainer.fit(module, ResumableLoader(list(make_loader(4))), ckpt_path=resume)
    return trainer


@pytest.fixture(autouse=True)
def _unreleased_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' add_adapter may ask for a peft that is newer than the newest release."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **settings: None)


@pytest.mark.parametrize(("project", "method"), CASES)
def test_a_public_project_trains_saves_and_resumes_unchanged(project: Project, method: Any, tmp_path: Path) -> None:
    whole = train(project, method(0.5), tmp_path, "whole")
    resumed = train(project, method(0.5), tmp_path, "resumed", resume=tmp_path / "whole-0.ckpt")
    assert resumed.global_step == whole.global_step > 0
    state, resumed_state = whole.lightning_module.state_dict(), resumed.lightning_module.state_dict()
    assert state.keys() == resumed_state.keys()
    assert [name for name in state if not same(state[name], resumed_state[name])] == []
    assert_no_trace(whole.lightning_module)
    plain = train(project, method(0.0), tmp_path, "plain")
    assert not same(weights(whole.lightning_module), weights(plain.lightning_module))  # the method did something
