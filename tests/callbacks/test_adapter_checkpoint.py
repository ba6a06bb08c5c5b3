"""Checkpoints without the frozen base: small, complete for what learns, resumable, and loadable by peft itself."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import build, fit, make_loader, make_net, same, trainer_of, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_flatlora import AdapterCheckpoint
from lightning_flatlora.callbacks.adapter_checkpoint.contents import unwrapped
from lightning_flatlora.callbacks.adapter_checkpoint.export import aside

SAVES_ON_EXCEPTION = "save_on_exception" in inspect.signature(ModelCheckpoint).parameters  # since Lightning 2.5.3


class Wide(nn.Module):
    """A frozen base much larger than the adapter, and a norm whose running statistics learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 400), nn.BatchNorm1d(400), nn.Linear(400, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Wide(), LoraConfig(r=2, target_modules=["first", "last"]))


def checkpoint(tmp_path: Path, **kwargs: Any) -> AdapterCheckpoint:
    settings = {"dirpath": tmp_path, "save_top_k": -1, "every_n_train_steps": 3, "filename": "{step}", **kwargs}
    return AdapterCheckpoint(**settings)


def test_holds_what_learns_and_nothing_of_the_base(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora", net=wide_net())
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    names = set(saved["state_dict"])
    assert {name for name, p in module.named_parameters() if p.requires_grad} <= names
    assert "net.base_model.model.norm.running_mean" in names
    assert not any("base_layer" in name for name in names)
    adapter = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    # weights, AdamW's two moments and Ê are at most four copies; the running statistics and zip entries are the rest
    assert sum(t.numel() * 4 for t in saved["state_dict"].values()) < 1.6 * adapter
    assert saved["optimizer_states"]
    assert any("EFMLoRA" in key for key in saved["callbacks"])


def test_the_module_is_as_before_when_fit_is_over(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    keys = list(module.state_dict())
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    assert list(module.state_dict()) == keys
    assert module.strict_loading
    module.inside.append(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, [checkpoint(tmp_path, filename="again")])
    assert list(module.state_dict()) == keys


def test_peft_loads_the_folder_beside_each_checkpoint(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora", net=wide_net())
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    for step in (3, 6, 9, 12):
        assert (tmp_path / f"step={step}.ckpt").exists()
        assert {p.name for p in (tmp_path / f"step={step}").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    torch.manual_seed(0)
    base = Wide()
    base.norm.load_state_dict(module.net.base_model.model.norm.state_dict())
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "step=12")).eval()
    x = torch.randn(5, 6)
    assert torch.allclose(loaded(x), module.net.eval()(x), atol=1e-6)
    assert not list(tmp_path.glob(".*partial"))


def test_folders_go_with_their_checkpoints(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path, save_top_k=1)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=12", "step=12.ckpt"]


def test_resumes_bit_for_bit_on_a_base_loaded_anew(tmp_path: Path) -> None:
    whole, callbacks, _ = build("efmlora")
    fit(tmp_path, whole, [*callbacks, checkpoint(tmp_path, every_n_train_steps=6)])
    resumed, callbacks, _ = build("efmlora")
    fit(tmp_path, resumed, [*callbacks, checkpoint(tmp_path / "2")], ckpt_path=tmp_path / "step=6.ckpt")
    assert same(weights(whole), weights(resumed))


def frozen_A(seed: int) -> nn.Module:
    """LoRA-FA: A is drawn and stays; another process draws another one."""
    net = make_net()
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if "lora_A" in name:
            nn.init.normal_(p)
            p.requires_grad_(False)
    return net


def test_a_frozen_A_is_saved_with_its_B(tmp_path: Path) -> None:
    whole, callbacks, _ = build("efmlora", net=frozen_A(1))
    fit(tmp_path, whole, [*callbacks, checkpoint(tmp_path, every_n_train_steps=6)])
    resumed, callbacks, _ = build("efmlora", net=frozen_A(2))
    fit(tmp_path, resumed, [*callbacks, checkpoint(tmp_path / "2")], ckpt_path=tmp_path / "step=6.ckpt")
    assert same(weights(whole), weights(resumed))
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    saved["state_dict"] = {name: value for name, value in saved["state_dict"].items() if "lora_A" not in name}
    torch.save(saved, tmp_path / "old.ckpt")
    module, callbacks, _ = build("efmlora", net=frozen_A(2))
    with pytest.raises(MisconfigurationException, match=r"lacks 3 weights that the module has, such as .*lora_A"):
        fit(tmp_path, module, [*callbacks, checkpoint(tmp_path / "3")], ckpt_path=tmp_path / "old.ckpt")


def test_an_adapter_that_is_not_active_is_saved_too(tmp_path: Path) -> None:
    def net(seed: int) -> nn.Module:
        made: Any = make_net()
        torch.manual_seed(seed)
        made.add_adapter("reference", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        return made

    module, callbacks, _ = build("efmlora", net=net(1))
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    other, _, _ = build("plain", net=net(2))
    trainer_of(tmp_path, [checkpoint(tmp_path)]).validate(
        other, make_loader(1), ckpt_path=tmp_path / "step=12.ckpt", verbose=False
    )
    own = {name: value for name, value in weights(module).items() if "reference" in name}
    assert len(own) == 2
    assert same(own, {name: value for name, value in weights(other).items() if name in own})


def test_save_weights_only_is_small_too(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path, save_weights_only=True)])
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}


def test_a_weight_that_was_left_out_and_is_trained_now_is_not_missed(tmp_path: Path) -> None:
    """It has the value of the base, as in the run that was saved."""
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    other = make_net()
    other.base_model.model[2].base_layer.bias.requires_grad_(True)
    module, callbacks, _ = build("plain", net=other)
    loads = trainer_of(tmp_path, [checkpoint(tmp_path)])
    loads.validate(module, make_loader(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    assert module.net.base_model.model[2].lora_B.default.weight.any()


def test_a_module_without_peft_is_refused(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="holds no peft model"):
        trainer_of(tmp_path, [checkpoint(tmp_path)]).fit(Plain(), make_loader())


def test_two_of_them_leave_the_module_as_it_was(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    keys = list(module.state_dict())
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", every_n_train_steps=4)])
    assert module.strict_loading
    assert list(module.state_dict()) == keys
    for path in (tmp_path / "a" / "step=12.ckpt", tmp_path / "b" / "step=12.ckpt"):
        assert not any("base_layer.weight" in name for name in torch.load(path, weights_only=True)["state_dict"])


def test_a_linked_last_checkpoint_has_a_folder_too(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path, save_last="link")])
    assert (tmp_path / "last" / "adapter_model.safetensors").samefile(
        tmp_path / "step=12" / "adapter_model.safetensors"
    )


def test_buffers_outside_of_the_base_are_kept(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    module.register_buffer("seen", torch.tensor(3.0))
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    assert torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]["seen"] == 3


def test_a_remote_folder_is_refused(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    remote = checkpoint(tmp_path)
    remote.dirpath = "memory://bucket"
    with pytest.raises(MisconfigurationException, match="must be a local folder"):
        fit(tmp_path, module, [*callbacks, remote])


def test_a_checkpoint_with_other_weights_is_refused_unless_loading_is_not_strict(tmp_path: Path) -> None:
    module, _, _ = build("plain")
    module.head = nn.Linear(2, 2)
    fit(tmp_path, module, [checkpoint(tmp_path, save_weights_only=True)])
    module, _, _ = build("plain")
    loads = trainer_of(tmp_path, [checkpoint(tmp_path)])
    with pytest.raises(MisconfigurationException, match=r"has 2 weights that the module lacks, such as head.weight"):
        loads.validate(module, make_loader(), ckpt_path=tmp_path / "step=3.ckpt")
    module.strict_loading = False
    with pytest.warns(UserWarning, match=r"has 2 weights that the module lacks"):
        loads.validate(module, make_loader(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)


def test_weights_that_a_file_knows_nothing_of_are_refused(tmp_path: Path) -> None:
    module, _, _ = build("plain")
    fit(tmp_path, module, [checkpoint(tmp_path, save_weights_only=True)])
    module, _, _ = build("plain")
    module.head = nn.Linear(2, 2)
    loads = trainer_of(tmp_path, [checkpoint(tmp_path)])
    with pytest.raises(MisconfigurationException, match=r"lacks 2 weights that the module has, such as head.weight"):
        loads.validate(module, make_loader(), ckpt_path=tmp_path / "step=3.ckpt")
    module.strict_loading = False
    with pytest.warns(UserWarning, match=r"lacks 2 weights that the module has"):
        loads.validate(module, make_loader(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    module, callbacks, _ = build("efmlora", net=make_net(rank=3))
    with pytest.raises(RuntimeError, match=r"size mismatch for net.base_model.model.0.lora_A.*\[2, 6\].*\[3, 6\]"):
        fit(tmp_path, module, [*callbacks, checkpoint(tmp_path / "2")], ckpt_path=tmp_path / "step=3.ckpt")


def test_evaluation_loads_the_adapter(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    (expected,) = trainer_of(tmp_path, []).validate(module, make_loader(), verbose=False)
    fresh, _, _ = build("plain")
    loads = trainer_of(tmp_path, [checkpoint(tmp_path)])
    (found,) = loads.validate(fresh, make_loader(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False)
    assert found == expected
    assert same(weights(fresh), weights(module))


def test_lightning_s_own_checkpoints_beside_it_and_from_before_are_whole(tmp_path: Path) -> None:
    """It resumes from a full checkpoint, and leaves the saving of others as it is."""
    whole, callbacks, _ = build("efmlora")
    plain = ModelCheckpoint(tmp_path / "full", save_top_k=-1, every_n_train_steps=6, filename="{step}")
    fit(tmp_path, whole, [*callbacks, plain, checkpoint(tmp_path)])
    assert "net.base_model.model.0.base_layer.weight" in torch.load(plain.best_model_path)["state_dict"]
    resumed, callbacks, _ = build("efmlora")
    fit(tmp_path, resumed, [*callbacks, checkpoint(tmp_path)], ckpt_path=tmp_path / "full" / "step=6.ckpt")
    assert same(weights(whole), weights(resumed))


def test_the_strategy_saves_for_others_as_before(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    trainer = fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)])
    module.inside.append(lambda *_: 1 / 0)
    saves = {"save_on_exception": True} if SAVES_ON_EXCEPTION else {}
    failing = trainer_of(tmp_path, [checkpoint(tmp_path, **saves)])
    with pytest.raises(ZeroDivisionError):
        failing.fit(module, make_loader(), make_loader(1))
    for strategy in (trainer.strategy, failing.strategy):
        assert not {"lightning_module_state_dict", "optimizer_state", "save_checkpoint"} & set(vars(strategy))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_names_are_clean_and_peft_finds_its_layers_in_a_wrapped_model(tmp_path: Path) -> None:
    """Activation checkpointing and compilation put modules between; files and folders don't show it."""
    net = make_net()
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    net.base_model.model[0] = checkpoint_wrapper(net.base_model.model[0])
    module, callbacks, _ = build("efmlora", net=net)
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)], max_epochs=1)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"net.{name}" for name in names}
    compiled = nn.ModuleDict({"net": torch.compile(net)})
    before = list(compiled.state_dict())
    with unwrapped(compiled):
        assert [n for n, p in compiled["net"].named_parameters() if p.requires_grad] == names
    assert list(compiled.state_dict()) == before
    saved = load_file(tmp_path / "step=6" / "adapter_model.safetensors")
    expected = []
    for layer in (0, 2, 4):
        expected += [f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"]
    assert sorted(saved) == expected


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path: Path) -> None:
    """The folder comes before the file: one without a file keeps its name, and hidden parts are written again."""
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path)], max_epochs=1)
    (tmp_path / "step=3.ckpt").unlink()
    aside(tmp_path / "step=6").mkdir()
    (aside(tmp_path / "step=6") / "file").write_text("of a checkpoint that never came")
    aside(tmp_path / "step=6.ckpt").write_text("half")
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, checkpoint(tmp_path, enable_version_counter=False)], max_epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step=3", "step=3.ckpt", "step=6", "step=6.ckpt"}
    assert {path.name for path in (tmp_path / "step=6").iterdir()} >= {"adapter_model.safetensors"}


def test_a_last_that_was_a_link_becomes_a_copy_and_back(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    for save_last in ("link", True, "link"):
        saver = checkpoint(tmp_path, save_last=save_last, save_top_k=1, enable_version_counter=False)
        fit(tmp_path, module, [*callbacks, saver], max_epochs=1)
        assert (tmp_path / "last.ckpt").is_symlink() == (tmp_path / "last").is_symlink() == (save_last == "link")
        assert (tmp_path / "last" / "adapter_model.safetensors").exists()
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
