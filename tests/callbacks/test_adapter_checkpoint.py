"""Checkpoints without the frozen base: small, complete in all that is trained, resumable, and loadable by peft itself.

Anything that occupies the place of a folder is kept; only folders written by AdapterCheckpoint are deleted.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import WEIGHTS, assert_resumes, saver, state, validate
from helpers import Classifier, build, calling, fit, make_loader, make_net, same, trainer_of, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_flatlora import EFMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.contents import unwrapped
from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST, remove_folder

UNWRITTEN = r"stays, since it is not ours, and .* has no folder"


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
    # weights, AdamW's two moments and Ê make at most four copies; running statistics and zip entries make up the rest
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


def frozen_A(seed: int) -> nn.Module:
    """LoRA-FA: A is random and stays fixed; another process draws a different one."""
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
    """It has the base's value, as in the run that was saved."""
    module = Classifier()
    module.net.base_model.model[2].base_layer.bias.requires_grad_(True)  # type: ignore[union-attr]
    validate(trained[1], module)
    assert module.net.base_model.model[2].lora_B.default.weight.any()  # type: ignore[union-attr]


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="AdapterCheckpoint: Classifier holds no peft model"):
        fit(tmp_path, Classifier(net=nn.Linear(6, 3)), [saver(tmp_path)])
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
    """AdapterCheckpoint resumes from a full checkpoint, and doesn't change what other callbacks save."""
    whole, callbacks, _ = build("efmlora")
    plain = ModelCheckpoint(tmp_path / "full", save_top_k=-1, every_n_train_steps=6, filename="{step}")
    fit(tmp_path, whole, [*callbacks, plain, saver(tmp_path)])
    assert "net.base_model.model.0.base_layer.weight" in state(Path(plain.best_model_path))
    resumed, callbacks, _ = build("efmlora")
    fit(tmp_path, resumed, [*callbacks, saver(tmp_path)], ckpt_path=tmp_path / "full" / "step=6.ckpt")
    assert same(weights(whole), weights(resumed))


def test_names_are_clean_and_peft_finds_its_layers_in_a_wrapped_model(tmp_path: Path) -> None:
    """Activation checkpointing and compilation insert modules, but files and folders don't show it."""
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


# -- the peft folder next to a checkpoint


def test_a_modules_card_takes_the_place_of_pefts_form(tmp_path: Path) -> None:
    for card, expected in ((None, "More Information Needed"), ("# Mine", "# Mine")):
        module, callbacks, _ = build("efmlora", net=wide_net())
        module.adapter_card = card
        fit(tmp_path / str(card), module, [*callbacks, saver(tmp_path / str(card))])
        assert expected in (tmp_path / str(card) / "step=12" / "README.md").read_text()
    assert (tmp_path / "# Mine" / "step=12" / "README.md").read_text() == "# Mine"


def train(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> Any:
    module = Classifier()
    fit(folder, module, [*callbacks], **kwargs)
    return module


def source_code(folder: Path) -> dict[str, str]:
    """A user's own folder, in which some files have peft's names, to make it hard."""
    (folder / "layers").mkdir(parents=True)
    files = {"train.py": "print()", "layers/lora.py": "", "README.md": "mine", "adapter_config.json": "{}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


def assert_untouched(folder: Path, files: dict[str, str]) -> None:
    assert {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()} == files


@pytest.mark.parametrize("counter", [True, False])
def test_what_a_user_has_under_a_checkpoints_name_stays(tmp_path: Path, counter: bool) -> None:
    """The checkpoint gets the name of the next version or, without versions, no folder."""
    folders = {tmp_path / name: source_code(tmp_path / name) for name in ("step=3", "last")}
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "step=6").symlink_to("elsewhere/deep")
    (tmp_path / "step=9").write_text("a file")
    with nullcontext() if counter else pytest.warns(UserWarning, match=UNWRITTEN):
        train(tmp_path, saver(tmp_path, save_last=True, enable_version_counter=counter))
    for folder, files in folders.items():
        assert_untouched(folder, files)
    assert (tmp_path / "step=6").is_symlink()
    assert not any((tmp_path / "elsewhere" / "deep").iterdir())
    assert (tmp_path / "step=9").read_text() == "a file"
    version = "-v1" if counter else ""
    for name in ("step=3", "step=6", "step=9", "last"):
        saved = state(tmp_path / f"{name}{version}.ckpt")
        folder = tmp_path / f"{name}-v1"
        assert folder.exists() == counter
        if counter:
            factor = load_file(folder / WEIGHTS)["base_model.model.0.lora_A.weight"]
            assert same(factor, saved["net.base_model.model.0.lora_A.default.weight"])


def test_a_kept_folder_stays_where_the_next_checkpoint_or_a_removal_comes(tmp_path: Path) -> None:
    """Someone who deletes the large files but keeps the small folders can train into the same place again."""
    settings = {"save_top_k": 1, "every_n_train_steps": None, "filename": "{epoch}"}
    train(tmp_path, saver(tmp_path, save_last=True, **settings), max_epochs=1)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    kept = {path: load_file(path / WEIGHTS) for path in tmp_path.iterdir()}
    assert len(kept) == 2
    train(tmp_path, saver(tmp_path, save_last=True, **settings), max_epochs=1)
    # The resumed run tries to remove its former best checkpoint, which is already gone.
    resumed = tmp_path / "resumed.ckpt"
    (tmp_path / "epoch=0-v1.ckpt").rename(resumed)
    kept[tmp_path / "epoch=0-v1"] = load_file(tmp_path / "epoch=0-v1" / WEIGHTS)
    train(tmp_path, saver(tmp_path, **settings), max_epochs=2, ckpt_path=resumed)
    for path, weights_before in kept.items():
        assert same(load_file(path / WEIGHTS), weights_before)
    assert (tmp_path / "last-v1" / WEIGHTS).exists()


def test_a_users_folder_in_the_place_of_a_file_stays(tmp_path: Path) -> None:
    files = source_code(tmp_path / "last.ckpt")
    with pytest.raises(OSError, match=r"last\.ckpt"):
        train(tmp_path, saver(tmp_path, save_last=True, enable_version_counter=False))
    train(tmp_path, saver(tmp_path, save_last=True))
    assert_untouched(tmp_path / "last.ckpt", files)
    assert (tmp_path / "last-v1.ckpt").is_file()


class Merged(Classifier):
    """Validates with its adapter merged into the base, and saves before unmerging it."""

    def on_validation_start(self) -> None:
        self.net.merge_adapter()  # type: ignore[operator]

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.net.unmerge_adapter()  # type: ignore[operator]


def test_a_save_while_the_adapter_is_merged_warns(tmp_path: Path) -> None:
    save = saver(tmp_path, monitor="val_loss", every_n_train_steps=None)
    with pytest.warns(UserWarning, match=r"at a save the adapter is merged into its base, as in net\.base"):
        fit(tmp_path, Merged(), [save], val=make_loader(1))
    with pytest.raises(MisconfigurationException, match="tensors of the base"):
        fit(tmp_path, Merged(), [saver(tmp_path / "2")], ckpt_path=save.best_model_path)


def test_a_list_that_names_files_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "ours").mkdir()
    names = ["../mine.txt", str(tmp_path / "mine.txt"), "a"]
    (tmp_path / "ours" / LIST).write_text(json.dumps({"checkpoint": "ours.ckpt", "files": names}))
    remove_folder(tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_users_file_in_our_folder_outlives_the_checkpoint(tmp_path: Path) -> None:
    def note(*args: Any) -> None:
        if (tmp_path / "step=3").exists():
            (tmp_path / "step=3" / "notes.txt").write_text("good run")

    train(tmp_path, calling(on_train_batch_end=note), saver(tmp_path, save_top_k=1))
    assert (tmp_path / "step=3" / "notes.txt").read_text() == "good run"
    assert (tmp_path / "step=12" / WEIGHTS).exists()
