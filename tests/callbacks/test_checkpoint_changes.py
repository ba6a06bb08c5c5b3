"""What a checkpoint holds beside adapters: what is outside of the base, buffers, and all that has ever been trained."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import HEAD, assert_resumes, epochs, module_of, network, saver, state, validate
from helpers import CLASSES, FEATURES, Classifier, fit, same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, load_adapter_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class TrainsHeadInFirstEpoch(Classifier):
    """One optimizer for all; the head of the base is frozen when the second epoch starts."""

    def __init__(self) -> None:
        super().__init__(net=network())

    def configure_optimizers(self) -> Any:
        self.net.base_model.model.head.requires_grad_(True)
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        self.net.base_model.model.head.requires_grad_(self.current_epoch == 0)


def test_a_head_that_was_trained_and_frozen_is_in_the_file(tmp_path: Path) -> None:
    whole = assert_resumes(tmp_path, TrainsHeadInFirstEpoch, save=epochs, file="epoch=1.ckpt", max_epochs=3)
    for epoch in (0, 1, 2):
        assert HEAD in state(tmp_path / "1" / f"epoch={epoch}.ckpt")
    assert same(state(tmp_path / "1" / "epoch=2.ckpt")[HEAD], whole.net.base_model.model.head.weight.detach())


def test_what_a_loaded_file_held_stays_in_the_next_one(tmp_path: Path) -> None:
    """Also if the head gets an adapter in between, so that peft puts a layer around it."""
    first = TrainsHeadInFirstEpoch()
    fit(tmp_path, first, [saver(tmp_path, save_weights_only=True)], max_epochs=1)
    for name, adapted in ((HEAD, False), (HEAD.replace("weight", "base_layer.weight"), True)):
        second = module_of()
        validate(tmp_path, second)
        if adapted:
            second.net.add_adapter("second", LoraConfig(r=2, target_modules=["head"]))  # type: ignore[operator]
        fit(tmp_path, second, [saver(tmp_path / name)], max_epochs=1)
        assert same(state(tmp_path / name / "step=6.ckpt")[name], first.net.base_model.model.head.weight.detach())


class FreezesInOnFitStart(Classifier):
    """As NeMo's modules do: which parts learn is known after the weights are restored."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(CLASSES, CLASSES)

    def on_fit_start(self) -> None:
        self.head.requires_grad_(False)
        self.net.base_model.model.head.requires_grad_(True)


def test_what_is_frozen_in_on_fit_start_can_be_resumed(tmp_path: Path) -> None:
    """Later moments are in tests/test_hostile_modules.py."""

    def module() -> Classifier:
        torch.manual_seed(5)
        return FreezesInOnFitStart(net=network())

    assert_resumes(tmp_path, module, save=epochs, file="epoch=1.ckpt", max_epochs=3)


def test_all_buffers_are_saved(tmp_path: Path) -> None:
    """Counted in place, written through .data in one element of many, replaced, and never changed."""
    assert_resumes(tmp_path, module_of)
    saved = state(tmp_path / "1" / "step=6.ckpt")
    base = "net.base_model.model."
    assert saved[f"{base}count"] == saved[f"{base}ema"][2000] == saved[f"{base}codes"][0] == 6
    assert f"{base}never" in saved
    assert HEAD not in saved


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_buffers_are_saved_too(tmp_path: Path, layout: str) -> None:
    """Such as a graph's adjacency, inside of the base and outside."""

    def module(weight: float) -> Classifier:
        made = module_of()
        for part in (made, made.net.base_model.model):
            part.register_buffer("adjacency", getattr(weight * torch.eye(4), layout)())
        return made

    fit(tmp_path, module(2.0), [saver(tmp_path)], max_epochs=1)
    loaded = load_adapter_checkpoint(module(1.0), tmp_path / "step=6.ckpt")
    for part in (loaded, loaded.net.base_model.model):
        assert torch.equal(part.adjacency.to_dense(), 2 * torch.eye(4))


class Writes(L.Callback):
    """Changes a frozen weight of the base by hand."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.net.base_model.model.head.weight.data.add_(1)


def test_what_is_written_into_a_frozen_weight_is_not_saved_and_noticed_on_loading(tmp_path: Path) -> None:
    """As the page on checkpoints says."""
    fit(tmp_path, module_of(), [Writes(), saver(tmp_path)])
    assert HEAD not in state(tmp_path / "step=6.ckpt")
    with pytest.raises(MisconfigurationException, match=r"1 tensors of the base.*head.weight"):
        fit(tmp_path, module_of(), [Writes(), saver(tmp_path / "2")], ckpt_path=tmp_path / "step=6.ckpt")


class TrainsHeadForTwoSteps(Classifier):
    """Its head is frozen at the start and the end of every epoch, and at each save."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_train_batch_start(self, *args: Any) -> None:
        self.net.base_model.model.head.requires_grad_(self.trainer.global_step in (2, 3))


def test_what_was_trained_between_two_saves_is_in_the_file(tmp_path: Path) -> None:
    module = TrainsHeadForTwoSteps(net=network())
    fit(tmp_path, module, [saver(tmp_path, every_n_train_steps=12)])
    assert same(state(tmp_path / "step=12.ckpt")[HEAD], module.net.base_model.model.head.weight.detach())


def test_a_second_fit_remembers_what_the_first_one_trained(tmp_path: Path) -> None:
    module = TrainsHeadInFirstEpoch()
    fit(tmp_path, module, [saver(tmp_path / "1")])
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    module.on_train_epoch_start = lambda: None
    module.net.base_model.model.head.requires_grad_(False)
    fit(tmp_path, module, [saver(tmp_path / "2")])
    assert HEAD in state(tmp_path / "2" / "step=12.ckpt")


class AddsAnAdapter(L.Callback):
    """Its targets are others, so that peft puts a layer around the head in the middle of the fit."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.net.add_adapter("second", LoraConfig(r=2, target_modules=["head"]))


def test_a_layer_that_gets_an_adapter_in_the_middle_has_not_changed(tmp_path: Path) -> None:
    fit(tmp_path, module_of(), [AddsAnAdapter(), saver(tmp_path)])
    saved = state(tmp_path / "step=12.ckpt")
    assert HEAD.replace("weight", "lora_A.second.weight") in saved
    assert HEAD.replace("weight", "base_layer.weight") not in saved
    trained = TrainsHeadInFirstEpoch()
    fit(tmp_path, trained, [AddsAnAdapter(), saver(tmp_path / "2")])
    assert HEAD.replace("weight", "base_layer.weight") in state(tmp_path / "2" / "step=12.ckpt")


class Attends(nn.Module):
    """Attention of PyTorch's, whose weights peft merges and takes apart in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(FEATURES, 2), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x)
        return self.head(x + mixed)


def test_attention_that_drifts_in_each_forward_resumes_bit_for_bit(tmp_path: Path) -> None:
    def module() -> Classifier:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
        return Classifier(net=get_peft_model(Attends(), config), lr=0.1)

    drifts = "net.base_model.model.attention.base_layer.in_proj_weight"
    whole = assert_resumes(tmp_path, module, callbacks=lambda: [EFMLoRA(0.1)])
    assert not torch.equal(whole.state_dict()[drifts], module().state_dict()[drifts])
