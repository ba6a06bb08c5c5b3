"""litgpt's own GPT, with LoRA on q, k and v in one layer: trained exactly, saved, and merged by litgpt.

For stacked q, k and v among the hostile modules, see tests/test_hostile_modules.py.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import state
from helpers import ResumableLoader, assert_no_trace, same, trainer_of, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from litgpt_models import (
    STACKED,
    LanguageModel,
    TwoPassLanguageModel,
    batches,
    gpt,
    joined,
    lora,
    loss,
    optimizer_of,
    split,
)
from reference import Reference
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA, find_pairs, load_adapter_checkpoint
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs.finders import PairsByName, litgpt_pairs

RHO = 0.3


def train(
    module: L.LightningModule,
    *callbacks: Any,
    steps: int = 3,
    loader: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> L.Trainer:
    torch.manual_seed(5)
    trainer = trainer_of(None, list(callbacks), max_epochs=-1, max_steps=steps, precision="64-true", **settings)
    trainer.fit(module, DataLoader(batches(10), batch_size=None) if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("estimator", ["average", "projected"])
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
@pytest.mark.parametrize("which", STACKED)
def test_steps_equal_the_dense_reference(which: str, front_end: str, estimator: Any) -> None:
    """The weights after three steps; the reference has separate parameters and really moves them."""
    apart, pairs = split(gpt(which))
    beta = 0.7 if front_end == "EFMLoRA" else None
    run = Reference(apart, pairs, loss, optimizer_of(apart), lambda step: RHO, beta=beta, estimator=estimator)
    run.train(batches(3))
    settings: dict[str, Any] = {"rho": RHO, "estimator": estimator, "finder": litgpt_pairs}
    model = gpt(which)
    if front_end == "EFMLoRA":
        train(LanguageModel(model), EFMLoRA(beta=0.7, **settings))
    elif front_end == "FMLoRA":
        train(LanguageModel(model), FMLoRA(**settings))
    else:
        train(TwoPassLanguageModel(model, **settings))
    expected, before = joined(apart), weights(gpt(which))
    assert len(expected) >= 4
    for name, value in weights(model).items():
        if name in expected:
            assert float((value - expected[name]).abs().max()) < 1e-10, name
            assert float((value - before[name]).abs().max()) > 1e-3, name
        else:
            assert same(value, before[name]), name
    assert_no_trace(model)


def test_a_merged_layer_is_no_pair() -> None:
    model = gpt()
    lora.merge_lora_weights(model)
    assert litgpt_pairs(model) == []


@pytest.mark.parametrize("which", STACKED)
def test_noise_is_relative_to_the_whole_weights_rows(which: str) -> None:
    """Each row's deviation, and which weights get noise, compared with litgpt's own sum of base and update."""
    model = gpt(which)
    noise = WeightNoise(model, finder=litgpt_pairs)
    assert len(noise.names) == len(find_pairs(model, finder=litgpt_pairs).pairs)
    tokens = batches(1)[0]
    clean = loss(model, tokens)
    with noise.applied(0.1, seed=3):
        assert loss(model, tokens) != clean
    assert loss(model, tokens) == clean
    layers = [layer for layer in model.modules() if isinstance(layer, lora.LoRALinear) and layer.r > 0]
    for layer, noisy in zip(layers, noise._layers, strict=True):
        merged = layer.linear.weight + layer.get_lora_AB()
        assert torch.allclose(noisy._squared_norms(), merged.square().sum(1), rtol=1e-10)


# -- AdapterCheckpoint


def save_of(folder: Path, **settings: Any) -> AdapterCheckpoint:
    return AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, finder=litgpt_pairs, **settings)


def test_adapter_checkpoint_leaves_out_the_base_and_is_resumed(tmp_path: Path) -> None:
    whole, second = LanguageModel(gpt("all layers")), LanguageModel(gpt("all layers"))
    save = save_of(tmp_path, every_n_train_steps=3)
    train(whole, EFMLoRA(RHO, finder=litgpt_pairs), save, steps=5, loader=ResumableLoader(batches(10)))
    file = tmp_path / "step=3.ckpt"
    saved = state(file)
    assert saved
    assert all("lora_" in name for name in saved)
    resumed = [EFMLoRA(RHO, finder=litgpt_pairs), save_of(tmp_path / "second")]
    train(second, *resumed, steps=5, loader=ResumableLoader(batches(10)), ckpt_path=file)
    assert same(weights(second), weights(whole))

    loaded = load_adapter_checkpoint(LanguageModel(gpt("all layers")), file, finder=litgpt_pairs)
    assert all(same(value, saved[name]) for name, value in weights(loaded).items() if name in saved)
    other = LanguageModel(gpt("all layers"))
    with torch.no_grad():
        other.model.lm_head.linear.weight.add_(1.0)
    with pytest.raises(MisconfigurationException, match="are not those of the run that was saved"):
        train(other, EFMLoRA(RHO, finder=litgpt_pairs), save_of(tmp_path / "third"), steps=5, ckpt_path=file)


def test_the_folder_holds_what_litgpt_reads(tmp_path: Path) -> None:
    """It holds the file of litgpt's own program, whose script loads it on top of the pretrained weights, as here."""
    module = LanguageModel(gpt("all layers"))
    train(module, EFMLoRA(RHO, finder=litgpt_pairs), save_of(tmp_path, every_n_train_steps=3), steps=3)
    adapter = torch.load(tmp_path / "step=3" / "lit_model.pth.lora")["model"]
    fresh = gpt("all layers")
    expected = {name for name, value in fresh.state_dict().items() if lora.lora_filter(name, value)}
    assert adapter.keys() == expected
    fresh.load_state_dict({**fresh.state_dict(), **adapter})
    assert same(weights(fresh), weights(module.model))


def test_other_finders_leave_factors_by_name(tmp_path: Path) -> None:
    finder = PairsByName("lora_A", "lora_B", "scaling", where=is_single)
    module = LanguageModel(gpt("all layers"))
    save = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, finder=finder)
    train(module, EFMLoRA(RHO, finder=finder), save, steps=3)
    factors = load_file(tmp_path / "step=3" / "factors.safetensors")
    assert "lm_head.lora_A" in factors
    assert all(same(value, dict(module.model.named_parameters())[name].detach()) for name, value in factors.items())
    # The trained factors of other layers count as parts of the base, and are in the checkpoint.
    assert any("qkv.lora_B" in name for name in torch.load(tmp_path / "step=3.ckpt")["state_dict"])


def is_single(layer: Any) -> bool:
    return isinstance(layer, lora.LoRALinear) and not isinstance(layer, lora.LoRAQKVLinear)


def test_a_model_without_peft_and_without_a_finder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="give a finder for other layers"):
        train(LanguageModel(gpt()), AdapterCheckpoint(tmp_path))
