"""Checkpoints without the frozen base: small, complete for what learns, resumable, and loadable by peft itself."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_bases import WEIGHTS, assert_resumes, saver, state, validate
from helpers import Classifier, build, fit, make_loader, make_net, same, trainer_of, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_flatlora import EFMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.contents import unwrapped

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


def learning(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_file_and_folder_hold_what_learns_and_nothing_of_the_base(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora", net=wide_net())
    module.register_buffer("seen", torch.tensor(3.0))
    fit(tmp_path, module, [*callbacks, saver(tmp_path)])
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    names = set(saved["state_dict"])
    assert learning(module) <= names
    assert "net.base_model.model.norm.running_mean" in names
    assert saved["state_dict"]["seen"] == 3
    assert not any("base_layer" in name for name in names)
    adapter = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    # weights, AdamW's two moments and Ê are at most four copies; the running statistics and zip entries are the rest
    assert sum(t.numel() * 4 for t in saved["state_dict"].values()) < 1.6 * adapter
    assert saved["optimizer_states"]
    assert any("EFMLoRA" in key for key in saved["callbacks"])
    for step in (3, 6, 9, 12):
        assert {p.name for p in (tmp_path / f"step={step}").iterdir()} >= {"adapter_config.json", WEIGHTS}
    torch.manual_seed(0)
    base = Wide()
    base.norm.load_state_dict(module.net.base_model.model.norm.state_dict())
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "step=12")).eval()
    x = torch.randn(5, 6)
    assert torch.allclose(loaded(x), module.net.eval()(x), atol=1e-6)
    assert not list(tmp_path.glob(".*partial"))


def test_save_weights_only_is_small_too_and_folders_go_with_their_checkpoints(tmp_path: Path) -> None:
    module, callbacks, _ = build("efmlora")
    fit(tmp_path, module, [*callbacks, saver(tmp_path, save_weights_only=True, save_top_k=1)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=12", "step=12.ckpt"]
    assert set(state(tmp_path / "step=12.ckpt")) == learning(module)


def test_module_and_strategy_are_as_before_when_fit_is_over(tmp_path: Path) -> None:
    """With two of the callback, and when a fit fails."""
    module, callbacks, _ = build("efmlora")
    keys = list(module.state_dict())
    savers = [saver(tmp_path / "a"), saver(tmp_path / "b", every_n_train_steps=4)]
    trainer = fit(tmp_path, module, [*callbacks, *savers])
    for path in (tmp_path / "a" / "step=12.ckpt", tmp_path / "b" / "step=12.ckpt"):
        assert not any("base_layer.weight" in name for name in state(path))
    saves = {"save_on_exception": True} if SAVES_ON_EXCEPTION else {}
    failing = trainer_of(tmp_path, [saver(tmp_path, filename="again", **saves)])
    module.inside.append(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.fit(module, make_loader(), make_loader(1))
    assert list(module.state_dict()) == keys
    assert module.strict_loading
    for strategy in (trainer.strategy, failing.strategy):
        assert not {"lightning_module_state_dict", "optimizer_state", "save_checkpoint"} & set(vars(strategy))


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
    seeds = iter((1, 2))
    assert_resumes(tmp_path, lambda: Classifier(net=frozen_A(next(seeds))), callbacks=lambda: [EFMLoRA(0.5)])
    saved = torch.load(tmp_path / "1" / "step=6.ckpt", weights_only=True)
    saved["state_dict"] = {name: value for name, value in saved["state_dict"].items() if "lora_A" not in name}
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(MisconfigurationException, match=r"lacks 3 weights that the module has, such as .*lora_A"):
        fit(tmp_path, Classifier(net=frozen_A(2)), [saver(tmp_path / "3")], ckpt_path=tmp_path / "old.ckpt")


def test_an_adapter_that_is_not_active_is_saved_too(tmp_path: Path) -> None:
    def module(seed: int) -> Classifier:
        made: Any = make_net()
        torch.manual_seed(seed)
        made.add_adapter("reference", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        return Classifier(net=made)

    trained, other = module(1), module(2)
    fit(tmp_path, trained, [saver(tmp_path)])
    validate(tmp_path, other, "step=12.ckpt")
    assert same(weights(other), weights(trained))


def test_a_weight_that_was_left_out_and_is_trained_now_is_not_missed(trained: tuple[Any, Path]) -> None:
    """It has the value of the base, as in the run that was saved."""
    module = Classifier()
    module.net.base_model.model[2].base_layer.bias.requires_grad_(True)  # type: ignore[union-attr]
    validate(trained[1], module)
    assert module.net.base_model.model[2].lora_B.default.weight.any()  # type: ignore[union-attr]


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__(net=nn.Linear(6, 3))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="AdapterCheckpoint: Plain holds no peft model"):
        fit(tmp_path, Plain(), [saver(tmp_path)])
    remote = saver(tmp_path)
    remote.dirpath = "memory://bucket"
    with pytest.raises(MisconfigurationException, match="AdapterCheckpoint: dirpath must be a local folder"):
        fit(tmp_path, Classifier(), [remote])


class WithHead(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("saved", "loads", "problem"),
    [
        (WithHead, Classifier, "has 2 weights that the module lacks, such as head.weight"),
        (Classifier, WithHead, "lacks 2 weights that the module has, such as head.weight"),
    ],
)
def test_other_weights_are_refused_unless_loading_is_not_strict(
    tmp_path: Path, saved: Any, loads: Any, problem: str
) -> None:
    fit(tmp_path, saved(), [saver(tmp_path, save_weights_only=True)])
    module = loads()
    with pytest.raises(MisconfigurationException, match=problem):
        validate(tmp_path, module)
    module.strict_loading = False
    with pytest.warns(UserWarning, match=problem):
        validate(tmp_path, module)


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_loads_the_adapter(tmp_path: Path, trained: tuple[Any, Path], frozen: bool) -> None:
    module, fresh = trained[0], Classifier()
    if frozen:
        fresh.freeze()
    (expected,) = trainer_of(tmp_path, []).validate(module, make_loader(1), verbose=False)
    assert validate(trained[1], fresh, "step=12.ckpt") == expected
    assert same(weights(fresh), weights(module))


def test_lightning_s_own_checkpoints_beside_it_and_from_before_are_whole(tmp_path: Path) -> None:
    """It resumes from a full checkpoint, and leaves the saving of others as it is."""
    whole, callbacks, _ = build("efmlora")
    plain = ModelCheckpoint(tmp_path / "full", save_top_k=-1, every_n_train_steps=6, filename="{step}")
    fit(tmp_path, whole, [*callbacks, plain, saver(tmp_path)])
    assert "net.base_model.model.0.base_layer.weight" in state(Path(plain.best_model_path))
    resumed, callbacks, _ = build("efmlora")
    fit(tmp_path, resumed, [*callbacks, saver(tmp_path)], ckpt_path=tmp_path / "full" / "step=6.ckpt")
    assert same(weights(whole), weights(resumed))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_names_are_clean_and_peft_finds_its_layers_in_a_wrapped_model(tmp_path: Path) -> None:
    """Activation checkpointing and compilation put modules between; files and folders don't show it."""
    net = make_net()
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    net.base_model.model[0] = checkpoint_wrapper(net.base_model.model[0])
    fit(tmp_path, Classifier(net=net), [saver(tmp_path)], max_epochs=1)
    assert set(state(tmp_path / "step=3.ckpt")) == {f"net.{name}" for name in names}
    compiled = nn.ModuleDict({"net": torch.compile(net)})
    before = list(compiled.state_dict())
    with unwrapped(compiled):
        assert [n for n, p in compiled["net"].named_parameters() if p.requires_grad] == names
    assert list(compiled.state_dict()) == before
    expected = set()
    for layer in (0, 2, 4):
        expected |= {f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"}
    assert set(load_file(tmp_path / "step=6" / WEIGHTS)) == expected


def test_a_link_is_written_as_a_file(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), [saver(tmp_path, save_last="link", save_top_k=1)], max_epochs=1)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    assert (tmp_path / "last" / WEIGHTS).exists()
