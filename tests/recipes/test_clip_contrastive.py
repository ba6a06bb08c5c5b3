"""Contrastive fine-tuning on a small_clip random open_clip model and drawn shapes."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

open_clip = pytest.importorskip("open_clip", reason="the recipes' dependencies are not installed")

from clip_contrastive_runs import COCA, SIGLIP, run, save_model  # noqa: E402
from trainers import trainer  # noqa: E402

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA  # noqa: E402
from recipes.clip.export import export  # noqa: E402
from recipes.clip.export import main as export_main  # noqa: E402
from recipes.clip_contrastive.data import ContrastiveData  # noqa: E402
from recipes.clip_contrastive.loss import ContrastiveLoss  # noqa: E402
from recipes.clip_contrastive.module import ContrastiveModel, ContrastiveModelFM  # noqa: E402
from recipes.shared.configs import methods_of  # noqa: E402
from recipes.shared.random_state import RandomState  # noqa: E402
from recipes.shared.sharding import BlocksAndFactors  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("command_line"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),  # runs of two steps
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
]

METHODS = methods_of("clip_contrastive")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


# -- training


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
    assert results["test_loss"] < torch.tensor(32.0).log() / 2  # half of chance
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
    learnt = ContrastiveModel(small_clip, lora=LORA, learn_logit_scale=True, learning_rate=1.0)
    learnt.configure_model()
    learnt.contrastive.logit_scale.data.fill_(np.log(100) - 0.01)
    seen = []

    class Seen(L.Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            seen.append(learnt.contrastive.logit_scale.item())

    trainer(tmp_path, Seen(), max_steps=4, limit_val_batches=0).fit(learnt, data)
    assert max(seen) <= np.log(100) + 1e-6
    assert len(set(seen)) > 1
    siglip = ContrastiveLoss(torch.tensor(4.7), torch.tensor(-10.0), learnt=True)
    siglip.clamp()
    assert siglip.logit_scale.item() == pytest.approx(4.7)


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
        torch.manual_seed(1)  # dropout
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.loss(batch).backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
        flags = [m.grad_checkpointing for m in module.modules() if hasattr(m, "grad_checkpointing")]
        assert flags
        assert all(flags) == checkpointing
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", [FMLoRA(rho=0.1, sync_ascent=False), None])
def test_an_ascent_of_each_rank_is_refused(
    method: Any, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ContrastiveModel(small_clip, lora=LORA)
    if method is None:
        module = ContrastiveModelFM(small_clip, lora=LORA, rho=0.1, sync_ascent=False)
    module.trainer = trainer(tmp_path, *filter(None, [method]))
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


def test_a_run_without_end_has_no_schedule(small_clip: str, pictures: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="set max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(ContrastiveModel(small_clip), ContrastiveData(pictures))


# -- the command line and the export


@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_fits_tests_and_exports(
    method: str, small_clip: str, pictures: str, tmp_path: Path, capsys: Any
) -> None:
    common = [
        f"--model.init_args.model={small_clip}",
        "--model.init_args.pretrained=null",
        f"--data.init_args.dataset={pictures}",
        "--data.init_args.batch_size=8",
        "--data.init_args.num_workers=0",
        "--model.init_args.warmup_steps=0",
        "--trainer.log_every_n_steps=1",
    ]
    run("fit", str(tmp_path), method, "one", [*common, "--trainer.max_steps=2", "--trainer.val_check_interval=2"])
    folder = tmp_path / "runs" / "clip_contrastive" / method / "version_0"
    assert "val_text_to_image_recall@10" in (folder / "metrics.csv").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    tested = run("test", str(tmp_path), method, "one", [*common, f"--ckpt_path={checkpoint}"])
    assert tested["logged"]["test_loss"] > 0

    capsys.readouterr()
    export_main([str(checkpoint), "exported"])
    assert "local-dir:exported" in capsys.readouterr().out
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain = open_clip.create_model(small_clip).state_dict()
    model = open_clip.create_model("local-dir:exported")  # unmodified open_clip
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert any("resblocks.1.attn" in name for name in moved)
    assert any("ln_2" in name for name in moved) == (method == "full")
    assert any("lora_B" in name for name in weights) == (method != "full")
    with pytest.raises(SystemExit):
        export_main([str(checkpoint), "exported"])
    assert "exported is there already and is not an empty folder" in capsys.readouterr().err


def test_efmlora_with_rho_0_is_lora_bit_for_bit(small_clip: str, pictures: str, tmp_path: Path) -> None:
    def trained(method: str, *options: str) -> dict[str, Tensor]:
        common = [f"--model.model={small_clip}", "--model.pretrained=null", "--model.learning_rate=0.02"]
        common += ["--model.warmup_steps=0", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
        common += [f"--data.dataset={pictures}", "--data.batch_size=8", "--data.num_workers=0"]
        found: dict[str, Tensor] = run("fit", str(tmp_path), method, "one", [*common, *options])["weights"]
        return found

    plain, zero = trained("lora"), trained("efmlora", "--trainer.callbacks.rho=0")
    assert plain
    assert all(torch.equal(weight, zero[name]) for name, weight in plain.items())
    flat = trained("efmlora", "--trainer.callbacks.rho=0.5")
    assert not all(torch.equal(weight, flat[name]) for name, weight in plain.items())


def test_a_checkpoint_of_another_model_is_not_exported(small_clip: str, pictures: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    model = {"class_path": f"{ContrastiveModel.__module__}.ContrastiveModel", "init_args": {"model": small_clip}}
    config.write_text(json.dumps({"model": model}))
    checkpoint = tmp_path / "run" / "other.ckpt"
    with pytest.raises(MisconfigurationException, match=r"checkpoint: there is no file .*other.ckpt"):
        export(checkpoint, tmp_path / "out", config)
    checkpoint.parent.mkdir()
    torch.save({"state_dict": {"net.other": torch.ones(1)}}, checkpoint)
    with pytest.raises(MisconfigurationException, match=r"other.ckpt is not of the model.*net.other"):
        export(checkpoint, tmp_path / "out", config)
    config.write_text("model: {class_path: nowhere.Model}")
    with pytest.raises(MisconfigurationException, match=r"config.yaml has no model that can be built"):
        export(checkpoint, tmp_path / "out")


# -- going on after a stop


class Record(L.Callback):
    """Batches and losses of a run."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[int], float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = batch["images"].double().sum().item(), batch["tokens"].flatten().tolist()
        self.steps.append((*seen, trainer.callback_metrics["train_loss"].item()))


def fitted(
    small_clip: str, pictures: str, folder: Path, num_workers: int = 0, ckpt_path: str | None = None
) -> tuple[list[Tensor], Record]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record = Record()
    module = ContrastiveModel(small_clip, lora=LORA, learning_rate=1e-2)
    savers = [
        AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        AdapterCheckpoint(folder, filename="val-{step}", save_top_k=-1, monitor="val_loss"),
    ]
    callbacks = [record, EFMLoRA(rho=0.5), RandomState(), *savers]
    fit = trainer(folder, *callbacks, enable_checkpointing=True, val_check_interval=2)
    fit.fit(module, ContrastiveData(pictures, batch_size=6, num_workers=num_workers), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record


def test_a_resumed_run_equals_the_uninterrupted_one(small_clip: str, pictures: str, tmp_path: Path) -> None:
    weights, whole = fitted(small_clip, pictures, tmp_path / "whole")
    assert len(whole.steps) == 8  # two epochs of 26 images in batches of 6
    # in the first epoch, in its validation, at its end; in the second
    for name in ("step=1", "val-step=2", "step=4", "step=7"):
        checkpoint = str(tmp_path / "whole" / f"{name}.ckpt")
        again, rest = fitted(small_clip, pictures, tmp_path / name, 0, checkpoint)
        assert rest.steps == whole.steps[int(name.split("=")[1]) :], name
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), name


def test_worker_processes_change_nothing(small_clip: str, pictures: str, tmp_path: Path) -> None:
    _, alone = fitted(small_clip, pictures, tmp_path / "alone")
    weights, whole = fitted(small_clip, pictures, tmp_path / "whole", num_workers=1)
    assert whole.steps == alone.steps
    again, rest = fitted(small_clip, pictures, tmp_path / "rest", 1, str(tmp_path / "whole" / "step=3.ckpt"))
    assert rest.steps == whole.steps[3:]
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))


def test_bad_models_are_named() -> None:
    with pytest.raises(MisconfigurationException, match="ViT-Nothing"):
        _ = ContrastiveModel("ViT-Nothing").clip
    with pytest.raises(MisconfigurationException, match="no-such-tag"):
        _ = ContrastiveModel("ViT-B-32", pretrained="no-such-tag").clip
