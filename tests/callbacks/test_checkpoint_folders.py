"""The peft folder beside a checkpoint: what stands in its place stays, and only a folder of ours alone is deleted."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from checkpointed_bases import WEIGHTS, saver, state
from helpers import Classifier, calling, fit, make_loader, same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST, remove_folder

UNWRITTEN = r"stays, since it is not ours, and .* has no folder"


def train(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> Any:
    module = Classifier()
    fit(folder, module, [*callbacks], **kwargs)
    return module


def source_code(folder: Path) -> dict[str, str]:
    """A user's own folder: peft's names among others, to make it hard."""
    (folder / "layers").mkdir(parents=True)
    files = {"train.py": "print()", "layers/lora.py": "", "README.md": "mine", "adapter_config.json": "{}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


def assert_untouched(folder: Path, files: dict[str, str]) -> None:
    assert {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()} == files


@pytest.mark.parametrize("counter", [True, False])
def test_what_a_user_has_under_a_checkpoints_name_stays(tmp_path: Path, counter: bool) -> None:
    """The checkpoint gets the next version's name or, without versions, no folder."""
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
    """Who deletes the large files and keeps the small folders may train again into the same place."""
    settings = {"save_top_k": 1, "every_n_train_steps": None, "filename": "{epoch}"}
    train(tmp_path, saver(tmp_path, save_last=True, **settings), max_epochs=1)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    kept = {path: load_file(path / WEIGHTS) for path in tmp_path.iterdir()}
    assert len(kept) == 2
    train(tmp_path, saver(tmp_path, save_last=True, **settings), max_epochs=1)
    # The resumed run removes its former best checkpoint, which is gone.
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
    """Validates with its adapter merged into the base."""

    unmerges_late = False

    def on_validation_start(self) -> None:
        self.net.merge_adapter()  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        if not self.unmerges_late:
            self.net.unmerge_adapter()  # type: ignore[operator]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.unmerges_late:
            self.net.unmerge_adapter()  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*already unmerged:UserWarning")
def test_a_save_while_the_adapter_is_merged_warns(tmp_path: Path) -> None:
    """pytest turns all other warnings into errors."""

    def run(folder: str, late: bool = False, **settings: Any) -> Any:
        module, save = Merged(), saver(tmp_path / folder, monitor="val_loss", every_n_train_steps=None)
        module.unmerges_late = late
        fit(tmp_path, module, [save], val=make_loader(1), **settings)
        return save.best_model_path

    kept = run("kept", max_epochs=2)
    run("resumed", max_epochs=3, ckpt_path=kept)
    with pytest.warns(UserWarning, match=r"at a save the adapter is merged into its base, as in net\.base"):
        late = run("late", late=True, max_epochs=2)
    with pytest.raises(MisconfigurationException, match="tensors of the base"):
        run("refused", max_epochs=3, ckpt_path=late)


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
