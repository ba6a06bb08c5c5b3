"""Saves that end midway, several jobs in one folder, and files in other formats.

For other full disks, and ranks with different files, see tests/distributed/test_crashes.py and test_checkpoints.py.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from checkpointed_bases import WEIGHTS, saver, state, validate
from helpers import Classifier, fit, make_loader, same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from safetensors.torch import load_file

from lightning_flatlora import AdapterCheckpoint, load_adapter_checkpoint
from lightning_flatlora.callbacks.adapter_checkpoint import export
from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST, PARTIAL
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import MARK

LAST: dict[str, Any] = {"save_top_k": 0, "save_last": True}


class Killed(BaseException):
    """Ends a run as a signal does."""


def train(folder: Path, **settings: Any) -> None:
    fit(folder, Classifier(), [saver(folder, **{**LAST, **settings.pop("save", {})})], **settings)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_pair(file: Path) -> None:
    """The folder holds the weights of its file."""
    saved = state(file)
    for name, value in load_file(file.with_suffix("") / WEIGHTS).items():
        assert same(value, saved[f"net.{name.removesuffix('weight')}default.weight"])


# -- saves that end midway


def test_a_first_save_that_ends_early_does_not_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job scripts look for last.ckpt."""
    save = torch.save

    def ends(checkpoint: Any, file: Any) -> None:
        if checkpoint["global_step"] >= 3:
            raise Killed
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", ends)
    with pytest.raises(Killed):
        train(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == set()
    train(tmp_path)
    assert names(tmp_path) == {"last", "last.ckpt"}


def test_a_save_that_ends_between_file_and_folder_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next save."""
    put, file, saves = export._put_in_place, tmp_path / "last.ckpt", iter(range(10))

    def put_in_place(*args: Any) -> None:
        if next(saves) == 2:  # after the trial save and the first one
            raise Killed
        put(*args)

    monkeypatch.setattr(export, "_put_in_place", put_in_place)
    with pytest.raises(Killed):
        train(tmp_path)
    monkeypatch.undo()
    assert torch.load(file, weights_only=True)["global_step"] == 6
    said = r"last\.ckpt is of step 6 and its folder of step 3, as a save was interrupted"
    with pytest.warns(UserWarning, match=said):
        load_adapter_checkpoint(Classifier(), file)
    with pytest.warns(UserWarning, match=said):
        train(tmp_path, ckpt_path=file)
    assert names(tmp_path) == {"last", "last.ckpt"}
    assert_pair(file)
    load_adapter_checkpoint(Classifier(), file)


def test_what_killed_jobs_left_is_deleted_after_an_hour(tmp_path: Path) -> None:
    """Newer files may still be in use by another job."""
    old, new = tmp_path / f".old{PARTIAL}", tmp_path / f".new{PARTIAL}"
    for place in (old, new):
        place.mkdir()
        (place / "file").write_text("half")
    long_ago = time.time() - 4000
    os.utime(old, times=(long_ago, long_ago))
    train(tmp_path)
    assert names(tmp_path) == {"last", "last.ckpt", new.name}


# -- several jobs in one folder


def test_a_job_may_save_under_the_same_names_in_the_middle_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, settings = torch.save, {"save_top_k": -1, "enable_version_counter": False}
    others = iter([lambda: train(tmp_path, save=settings)])

    def saves_after_another_job(checkpoint: Any, file: Any) -> None:
        if checkpoint["global_step"] == 3:
            for run in others:
                run()
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", saves_after_another_job)
    train(tmp_path, save=settings)
    assert not list(others)
    assert not list(tmp_path.glob(".*"))
    for name in ("last", *(f"step={step}" for step in (3, 6, 9, 12))):
        assert_pair(tmp_path / f"{name}.ckpt")


# -- a full disk


def test_a_full_disk_that_safetensors_meets_is_named_and_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises another kind of error than Python's file functions."""
    save, calls = peft.peft_model.safe_save_file, iter(range(100))

    def fails(*args: Any, **options: Any) -> None:
        if next(calls) == 2:  # one call for the trial save, then one every third step
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*args, **options)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fails)
    with pytest.raises(OSError, match=r"could not write .*last\.ckpt \(0\.0 MB\): .*No space left on device"):
        train(tmp_path)
    assert names(tmp_path) == {"last", "last.ckpt"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert_pair(tmp_path / "last.ckpt")


# -- formats


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any]:
    """A file saved after one epoch, and its content."""
    train(tmp_path, max_epochs=1)
    return tmp_path, torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_file_and_folder_tell_format_and_step(saved: tuple[Path, Any]) -> None:
    """Files without them come from earlier versions, and can still be read."""
    folder, checkpoint = saved
    found = json.loads((folder / "last" / LIST).read_text())
    assert (found["format"], found["step"], checkpoint[MARK].pop("format")) == (1, 6, 1)
    del found["format"], found["step"]
    (folder / "last" / LIST).write_text(json.dumps(found))
    torch.save(checkpoint, folder / "last.ckpt")
    load_adapter_checkpoint(Classifier(), folder / "last.ckpt")
    train(folder, ckpt_path=folder / "last.ckpt")
    assert json.loads((folder / "last" / LIST).read_text())["step"] == 12


LATER = {"format": 2, "something": "else"}


@pytest.mark.parametrize("mark", [None, "mine", {}, {"left_out": {}}, {"left_out": [], "scalings": {}}, LATER])
def test_a_later_format_and_a_mark_that_is_not_ours_are_refused(saved: tuple[Path, Any], mark: Any) -> None:
    folder, checkpoint = saved
    problem = "the checkpoint's mark is .* or damaged: .* load an intact copy"
    if mark is LATER:
        problem = "is of format 2, where 1 is read, .*: install a newer"
    torch.save({**checkpoint, MARK: mark}, folder / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=problem):
        load_adapter_checkpoint(Classifier(), folder / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=problem):
        validate(folder, Classifier(), "other.ckpt")


@pytest.mark.parametrize("found", ["", "[]", '{"checkpoint": "last.ckpt", "format": 2}'])
def test_a_folder_with_a_list_that_is_not_ours_stays(saved: tuple[Path, Any], found: str) -> None:
    folder, _ = saved
    (folder / "last" / LIST).write_text(found)
    before = {path: path.read_bytes() for path in (folder / "last").iterdir()}
    with pytest.warns(UserWarning, match="last stays, since it is not ours"):
        train(folder, save={"enable_version_counter": False})
    assert {path: path.read_bytes() for path in (folder / "last").iterdir()} == before


def test_the_folder_in_the_place_of_the_file_is_refused(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    said = r"last is an adapter's folder, .* give the file .*last\.ckpt"
    with pytest.raises(MisconfigurationException, match=said):
        load_adapter_checkpoint(Classifier(), folder / "last")
    with pytest.raises(MisconfigurationException, match=said):
        validate(folder, Classifier(), "last")


@pytest.mark.parametrize("path", ["{folder}/ck/../mine", "local://{folder}/mine", "{folder}/mine"])
def test_only_what_lies_in_its_own_folder_is_deleted(tmp_path: Path, path: str) -> None:
    """The resumed checkpoint itself lists the ones that came before it."""
    (tmp_path / "mine").mkdir()
    keeps_one = saver(tmp_path / "ck", save_top_k=1, every_n_train_steps=1)
    keeps_one.best_model_path = path.format(folder=tmp_path)
    fit(tmp_path, Classifier(), [keeps_one], max_steps=2)
    assert (tmp_path / "mine").exists()
    assert len(list((tmp_path / "ck").glob("*.ckpt"))) == 1


# -- the last checkpoint


class Worsens(Classifier):
    """Its first epoch is the best, and its fifth doesn't start."""

    def on_validation_epoch_end(self) -> None:
        self.log("loss", float(self.current_epoch))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 4:
            raise Killed


@pytest.mark.parametrize(
    "settings", [{"monitor": "loss"}, {"monitor": "loss", "every_n_epochs": 2}, {"save_top_k": 0}], ids=str
)
def test_the_last_checkpoint_is_of_the_last_epoch(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Even if that epoch is not among the best; otherwise a resumed run would repeat all epochs since the best."""
    with pytest.raises(Killed):
        fit(
            tmp_path,
            Worsens(),
            [AdapterCheckpoint(tmp_path, save_last=True, **settings)],
            make_loader(3),
            val=make_loader(1),
            max_epochs=5,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12
