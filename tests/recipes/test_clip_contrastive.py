"""Contrastive fine-tuning on a small random open_clip model and drawn shapes."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import pytest
import torch
from clip_contrastive_runs import COCA, SIGLIP, save_model
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import run, trainer

from lightning_flatlora import FMLoRA
from recipes.clip.export import main as export_main
from recipes.clip_contrastive.data import ContrastiveData
from recipes.clip_contrastive.module import ContrastiveModel
from recipes.command_line.cli import RecipeCLI
from recipes.training.sharding import BlocksAndFactors

pytestmark = pytest.mark.usefixtures("command_line")

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


def test_all_weights_are_trained_from_scratch_with_a_plain_trainer(
    small_clip: str, pictures: str, tmp_path: Path
) -> None:
    L.seed_everything(0, verbose=False)
    module = ContrastiveModel(model=small_clip, pretrained=None, lora=None, learning_rate=3e-3, warmup_steps=5)
    data = ContrastiveData(pictures, batch_size=16, validation_share=0.0, test_share=0.0)
    before = {name: value.clone() for name, value in module.clip.net.state_dict().items()}
    fit = trainer(tmp_path, max_epochs=40, limit_val_batches=0)
    fit.fit(module, data)
    (results,) = fit.test(module, ContrastiveData(pictures, test_dataset=pictures), verbose=False)
    assert results["test_loss"] < torch.tensor(32.0).log() / 2  # half of the loss at chance
    assert results["test_image_to_text_recall@1"] > 0.4
    assert results["test_text_to_image_recall@1"] > 0.4
    still = {name for name, value in module.net.state_dict().items() if torch.equal(value, before.get(name, value + 1))}
    assert still <= {"logit_scale", "attn_mask"}
    assert module.contrastive.logit_scale.item() != before["logit_scale"].item()
    assert module.open_clip_state()["logit_scale"] == module.contrastive.logit_scale.squeeze()


@pytest.mark.parametrize("config", [SIGLIP, COCA], ids=["siglip", "coca"])
def test_other_models(config: dict[str, Any], pictures: str, tmp_path: Path) -> None:
    name = save_model(tmp_path / "model", config)
    module = ContrastiveModel(name, learning_rate=1e-2)
    data = ContrastiveData(pictures, batch_size=16)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
    assert module.contrastive.kind == ("siglip" if config is SIGLIP else "clip")
    before = open_clip.create_model(name).state_dict()
    after = module.open_clip_state()
    assert before.keys() == after.keys()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert ("logit_bias" in after) == (config is SIGLIP)
    assert not still & {"logit_bias", "logit_scale"}
    assert all(name.startswith("text_decoder.") or name.endswith("attn_mask") for name in still)
    assert any(name.startswith("text_decoder.") for name in still) == (config is COCA)


def test_the_scale_is_frozen_beside_an_adapter_and_clamped_where_it_is_learnt(
    small_clip: str, pictures: str, tmp_path: Path
) -> None:
    data = ContrastiveData(pictures, batch_size=16)
    frozen = ContrastiveModel(small_clip, lora=LORA, learning_rate=1.0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(frozen, data)
    assert frozen.contrastive.logit_scale.item() == pytest.approx(np.log(1 / 0.07))
    learnt = ContrastiveModel(small_clip, lora=LORA, learn_logit_scale=True, learning_rate=9.0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(learnt, data)
    assert learnt.contrastive.logit_scale.item() in (0.0, pytest.approx(np.log(100)))


def test_vectors_have_no_weight_decay(small_clip: str, pictures: str, tmp_path: Path) -> None:
    module = ContrastiveModel(small_clip, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-6)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(module, ContrastiveData(pictures, batch_size=16))
    for group in fit.optimizers[0].param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.5}
    assert sum(len(group["params"]) for group in fit.optimizers[0].param_groups) == sum(
        p.requires_grad for p in module.parameters()
    )


def test_gradient_checkpointing_changes_no_gradient(small_clip: str) -> None:
    batch = {"images": torch.randn(4, 3, 32, 32), "tokens": torch.randint(1, 1000, (4, 12))}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = ContrastiveModel(small_clip, lora=LORA, gradient_checkpointing=checkpointing)
        module.configure_model()
        torch.manual_seed(1)  # for dropout
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.loss(batch).backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
        flags = [m.grad_checkpointing for m in module.modules() if hasattr(m, "grad_checkpointing")]
        assert flags
        assert all(flags) == checkpointing
    torch.testing.assert_close(*gradients)


def test_an_ascent_of_each_rank_is_refused(small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ContrastiveModel(small_clip, lora=LORA)
    module.trainer = trainer(tmp_path, FMLoRA(rho=0.1, sync_ascent=False))
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(MisconfigurationException, match="sync_ascent=False has no meaning"):
        module.configure_model()


def test_all_weights_under_fsdp1_are_refused(small_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ContrastiveModel(small_clip)
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    strategy = FSDPStrategy(auto_wrap_policy=BlocksAndFactors())
    monkeypatch.setattr(module.trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(MisconfigurationException, match=r"lora=None trains all weights.*use FSDP2 or ddp"):
        module.configure_model()


def test_there_is_nothing_to_predict(small_clip: str) -> None:
    arguments = [f"--model.model={small_clip}", "--model.pretrained=null", "--trainer.accelerator=cpu"]
    with pytest.raises(MisconfigurationException, match="predict"):
        RecipeCLI(["predict", *arguments], recipe="clip_contrastive")


@pytest.mark.parametrize("method", ["efmlora", "full"])
def test_a_run_is_exported(method: str, small_clip: str, pictures: str, tmp_path: Path, capsys: Any) -> None:
    options = [
        f"--model.init_args.model={small_clip}",
        "--model.init_args.pretrained=null",
        f"--data.init_args.dataset={pictures}",
        "--data.init_args.batch_size=8",
        "--data.init_args.num_workers=0",
        "--model.init_args.warmup_steps=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
    ]
    run("fit", str(tmp_path), "clip_contrastive", method, "one", options)
    folder = tmp_path / "runs" / "clip_contrastive" / method / "version_0"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    export_main(checkpoint, Path("exported"))
    assert "library_name: open_clip" in Path("exported/README.md").read_text()
    assert "local-dir:exported" in capsys.readouterr().out
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain = open_clip.create_model(small_clip).state_dict()
    model = open_clip.create_model("local-dir:exported")  # open_clip without our split
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert any("resblocks.1.attn" in name for name in moved)
    assert any("ln_2" in name for name in moved) == (method == "full")
    assert any("lora_B" in name for name in weights) == (method != "full")
    with pytest.raises(MisconfigurationException, match="exported exists and is not an empty folder"):
        export_main(checkpoint, Path("exported"))
