"""What a checkpoint holds besides adapters: all outside of the base, buffers, and everything that was ever trained.

A different base is noticed, by its shapes and a sample of its values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_bases import HEAD, assert_resumes, epochs, module_of, network, saver, state, validate
from helpers import CLASSES, FEATURES, Classifier, fit, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, load_adapter_checkpoint
from lightning_flatlora.callbacks.adapter_checkpoint.contents import differing, identities_of


class TrainsHead(Classifier):
    """One optimizer for everything; the base's head is frozen except in some steps, by default the first epoch's."""

    def __init__(self, steps: Sequence[int] = range(6)) -> None:
        super().__init__(net=network())
        self.steps = steps

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_train_batch_start(self, *args: Any) -> None:
        self.net.base_model.model.head.requires_grad_(self.trainer.global_step in self.steps)


def test_a_head_that_was_trained_and_frozen_is_in_the_file(tmp_path: Path) -> None:
    whole = assert_resumes(tmp_path, TrainsHead, save=epochs, file="epoch=1.ckpt", max_epochs=3)
    for epoch in (0, 1, 2):
        assert HEAD in state(tmp_path / "1" / f"epoch={epoch}.ckpt")
    assert same(state(tmp_path / "1" / "epoch=2.ckpt")[HEAD], whole.net.base_model.model.head.weight.detach())


def test_what_a_loaded_file_held_stays_in_the_next_one(tmp_path: Path) -> None:
    """Even if the head gets an adapter in between, so that peft wraps it in a layer."""
    first = TrainsHead()
    fit(tmp_path, first, [saver(tmp_path, save_weights_only=True)], max_epochs=1)
    for name, adapted in ((HEAD, False), (HEAD.replace("weight", "base_layer.weight"), True)):
        second = module_of()
        validate(tmp_path, second)
        if adapted:
            second.net.add_adapter("second", LoraConfig(r=2, target_modules=["head"]))  # type: ignore[operator]
        fit(tmp_path, second, [saver(tmp_path / name)], max_epochs=1)
        assert same(state(tmp_path / name / "step=6.ckpt")[name], first.net.base_model.model.head.weight.detach())


def test_all_buffers_are_saved(tmp_path: Path) -> None:
    """Buffers counted in place, written through .data in one of many elements, replaced, and never changed."""
    assert_resumes(tmp_path, module_of)
    saved = state(tmp_path / "1" / "step=6.ckpt")
    base = "net.base_model.model."
    assert saved[f"{base}count"] == saved[f"{base}ema"][2000] == saved[f"{base}codes"][0] == 6
    assert f"{base}never" in saved
    assert HEAD not in saved


def test_what_was_trained_between_two_saves_is_in_the_file(tmp_path: Path) -> None:
    """The head is frozen at the start and the end of each epoch, and at each save."""
    module = TrainsHead((2, 3))
    fit(tmp_path, module, [saver(tmp_path, every_n_train_steps=12)])
    assert same(state(tmp_path / "step=12.ckpt")[HEAD], module.net.base_model.model.head.weight.detach())


def test_what_another_trainer_has_trained_is_in_the_file(tmp_path: Path) -> None:
    """As when the head is trained first and LoRA afterwards, or in a module that load_adapter_checkpoint has filled."""
    module = TrainsHead((2, 3))
    fit(tmp_path, module, [saver(tmp_path / "1")], max_epochs=1)
    for each in (module, load_adapter_checkpoint(TrainsHead(), tmp_path / "1" / "step=6.ckpt")):
        each.steps = ()
        fit(tmp_path, each, [saver(tmp_path / "2")], max_epochs=1)
        assert HEAD in state(tmp_path / "2" / "step=6.ckpt")


class Attends(nn.Module):
    """PyTorch's attention, whose weights peft merges and unmerges in each forward pass."""

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


def test_another_base_is_noticed(tmp_path: Path, trained_base: Path) -> None:
    """If the loader draws the head again, resuming is refused, and an evaluation warns."""
    said, file = r"1 tensors of the base.*base_model.model.head.weight", trained_base / "step=6.ckpt"
    with pytest.raises(MisconfigurationException, match=f"{said}.*strict"):
        fit(tmp_path, module_of(head_seed=2), [saver(tmp_path)], ckpt_path=file)
    with pytest.warns(UserWarning, match=said):
        validate(trained_base, module_of(head_seed=2))
    lenient = module_of(head_seed=2)
    lenient.strict_loading = False
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path, lenient, [saver(tmp_path)], ckpt_path=file)


def test_a_base_that_differs_between_the_samples_is_taken_for_the_same(tmp_path: Path, trained_base: Path) -> None:
    """As the page on checkpoints says, only a few values of each weight are compared."""
    other = module_of()
    other.net.base_model.model.head.weight.data[0, 1] += 1
    fit(tmp_path, other, [saver(tmp_path)], ckpt_path=trained_base / "step=6.ckpt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_precision_is_the_same_base(trained_base: Path, dtype: torch.dtype) -> None:
    """pytest turns warnings into errors."""
    validate(trained_base, module_of().to(dtype), dtype=dtype)


class BuiltLater(Classifier):
    """Builds its net in configure_model, and a wrong one before that."""

    def configure_model(self) -> None:
        if not hasattr(self.net, "peft_config"):
            self.net = network()


def test_a_module_that_is_built_in_configure_model_is_built_before_it_is_loaded(tmp_path: Path) -> None:
    """As Lightning's load_from_checkpoint does."""
    trained = BuiltLater(net=nn.Identity())
    fit(tmp_path, trained, [saver(tmp_path)], max_epochs=1)
    again = BuiltLater(net=nn.Identity())
    load_adapter_checkpoint(again, tmp_path / "step=6.ckpt")
    assert same(weights(again), weights(trained))


def test_another_base_of_half_precision_is_not_taken_for_rounding() -> None:
    """A chat model's weights are within bfloat16 rounding of the pretrained weights."""
    weight = 1 + torch.rand(40)
    half, chat = identities_of({"w": weight.bfloat16()}), identities_of({"w": (weight * 1.004).bfloat16()})
    assert differing(half, chat) == ["w"]
    assert differing(half, identities_of({"w": weight})) == []


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"lora_A": torch.ones(2)}, tmp_path / "adapter.bin")
    with pytest.raises(MisconfigurationException, match=r"adapter.bin has no state_dict: give a .ckpt of"):
        load_adapter_checkpoint(nn.Linear(2, 1), tmp_path / "adapter.bin")


def initialized(init: str, seed: int) -> Classifier:
    """A module on the same base, with weights rewritten by PiSSA, whose fast version draws random numbers."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 3))
    torch.manual_seed(seed)
    return Classifier(net=get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)))


def test_a_base_that_was_rewritten_at_random_is_in_the_file(tmp_path: Path) -> None:
    weight = "net.base_model.model.0.base_layer.weight"
    whole, other = (initialized("pissa_niter_1", seed) for seed in (1, 2))
    assert not same(other.state_dict()[weight], whole.state_dict()[weight])
    with pytest.warns(UserWarning, match="AdapterCheckpoint: peft rewrote the base of net, as init_lora_weights says"):
        fit(tmp_path, whole, [saver(tmp_path / "1")])
    with pytest.warns(UserWarning, match="AdapterCheckpoint: peft rewrote"):
        fit(tmp_path, other, [saver(tmp_path / "2")], ckpt_path=tmp_path / "1" / "step=6.ckpt")
    assert same(whole.state_dict(), other.state_dict())
    assert same(state(tmp_path / "2" / "step=12.ckpt")[weight], whole.state_dict()[weight])


def test_a_base_that_comes_out_the_same_is_left_out(tmp_path: Path) -> None:
    fit(tmp_path, initialized("pissa", 1), [saver(tmp_path)])
    assert "net.base_model.model.0.base_layer.weight" not in state(tmp_path / "step=6.ckpt")


def test_another_scaling_of_the_adapter_is_told_of(tmp_path: Path, trained_base: Path) -> None:
    """Weights with another lora_alpha or use_rslora are a different model with the same names and shapes."""
    file = trained_base / "step=6.ckpt"
    for load in (
        lambda module: load_adapter_checkpoint(module, file),
        lambda module: validate(trained_base, module),
        lambda module: fit(tmp_path, module, [saver(tmp_path)], ckpt_path=file),
    ):
        module = module_of()
        module.net.base_model.model.first.scaling["default"] = 16.0
        with pytest.warns(UserWarning, match=r"another lora_alpha, r or use_rslora in 1 layers, .*first.lora_B"):
            load(module)


class Merges(Callback):
    """ReLoRA: at the start of each epoch but the first, the adapter goes into the base and begins again."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            return
        for layer in pl_module.net.modules():
            if isinstance(layer, LoraLayer):
                layer.base_layer.weight.data += layer.get_delta_weight("default")
                nn.init.zeros_(layer.lora_B["default"].weight)


def test_a_base_that_the_run_changes_is_in_the_file(tmp_path: Path) -> None:
    """Otherwise no resumed run would have it, and the merged adapters would be lost."""
    said = "the base has changed, as by ReLoRA. The .ckpt files hold it, the folders don't"
    whole, resumed = Classifier(), Classifier()
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path, whole, [Merges(), epochs(tmp_path)], max_epochs=3)
    assert len(state(tmp_path / "epoch=1.ckpt")) > len(state(tmp_path / "epoch=0.ckpt"))
    fit(tmp_path, resumed, [Merges(), epochs(tmp_path / "2")], max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    for name, value in whole.state_dict().items():
        assert same(value, resumed.state_dict()[name]), name
