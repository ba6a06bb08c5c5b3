"""Damaged and hostile checkpoints: each ends in our error, or loads; none runs code or writes elsewhere."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_bases import module_of, saver
from helpers import Classifier, fit, make_net, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import AdapterAveraging, AdapterCheckpoint, EFMLoRA, load_adapter_checkpoint
from lightning_flatlora.callbacks.adapter_checkpoint.export import LIST
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import MARK

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JUNK: tuple[Any, ...] = (
    None, True, -1, 2**70, float("nan"), "text", "../../up", "", [], [[]], {}, {"a": {}}, torch.zeros(2), b"bytes",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each part of nested dicts and lists."""
    yield path
    items: list[Any] = list(value.items()) if isinstance(value, dict) else []
    items += enumerate(value) if isinstance(value, list) else []
    for key, each in items:
        yield from places(each, (*path, key))


def replaced(checkpoint: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy in which one part is something else."""
    if not path:
        return junk
    found = copy.copy(checkpoint)
    found[path[0]] = replaced(checkpoint[path[0]], path[1:], junk)
    return found


def assert_loads_or_names(file: Path) -> None:
    try:
        load_adapter_checkpoint(module_of(), file)
    except MisconfigurationException as caught:
        error = str(caught)
    else:
        return
    assert file.name in error or "AdapterCheckpoint: the checkpoint" in error


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the states of EFMLoRA and AdapterAveraging."""
    folder = tmp_path_factory.mktemp("good")
    fit(folder, module_of(), [EFMLoRA(0.5), AdapterAveraging(0.9), saver(folder)], max_epochs=1)
    return folder / "step=6.ckpt"


@QUICK
@given(data=st.data())
def test_a_checkpoint_with_damaged_bytes(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Flipped, cut, or with another file's bytes within: an error that names the file, unless it loads."""
    content = bytearray(good.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "fill"]))
    if kind == "cut":
        del content[start:]
    else:
        filling = b"\xff" if kind == "flip" else b"PK\x03\x04" * 50
        content[start : start + len(filling)] = filling
    file = tmp_path / "damaged.ckpt"
    file.write_bytes(content)
    assert_loads_or_names(file)


@pytest.mark.filterwarnings("ignore")  # of a changed base, and of values that PyTorch converts
@QUICK
@given(data=st.data())
def test_a_checkpoint_with_other_parts(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    checkpoint = torch.load(good, weights_only=True)
    of_ours = {key: checkpoint[key] for key in ("state_dict", MARK, "global_step")}
    path = data.draw(st.sampled_from(list(places(of_ours))[1:]))
    file = tmp_path / "other.ckpt"
    torch.save(replaced(checkpoint, path, data.draw(st.sampled_from(JUNK))), file)
    assert_loads_or_names(file)


@pytest.mark.filterwarnings("ignore:AdapterCheckpoint.* is of step 6 and its folder of step")
@QUICK
@given(data=st.data())
def test_a_marker_with_other_parts(good: Path, data: st.DataObject) -> None:
    """It only says which folder is ours, so a damaged one takes no checkpoint with it."""
    marker = good.with_suffix("") / LIST
    content = json.loads(marker.read_text())
    path = data.draw(st.sampled_from(list(places(content))))
    junk = data.draw(st.sampled_from([*JUNK[:12], "[" * 200_000]))
    text = json.dumps(replaced(content, path, junk))
    text = data.draw(st.sampled_from([text, "[" * 300_000, text[: len(text) // 2], "\x00\xff", "\ufeff" + text]))
    before = marker.read_bytes()
    marker.write_text(text, errors="replace")
    try:
        load_adapter_checkpoint(module_of(), good)
    finally:
        marker.write_bytes(before)


@pytest.mark.filterwarnings("ignore")  # of values that PyTorch converts
@pytest.mark.parametrize("seed", range(40))
def test_states_of_callbacks_with_other_parts(good: Path, tmp_path: Path, seed: int) -> None:
    """A resumed run ends in our error before its first step, or trains with finite weights."""
    draw = random.Random(seed)
    checkpoint = torch.load(good, weights_only=True)
    states = {key: checkpoint["callbacks"][key] for key in ("EFMLoRA", "AdapterAveraging")}
    path = draw.choice(list(places(states))[1:])
    checkpoint["callbacks"] = replaced(checkpoint["callbacks"], path, draw.choice(JUNK))
    file = tmp_path / "other.ckpt"
    torch.save(checkpoint, file)
    module = module_of()
    callbacks: list[Any] = [EFMLoRA(0.5), AdapterAveraging(0.9), AdapterCheckpoint(tmp_path / "out")]
    try:
        fit(tmp_path, module, callbacks, ckpt_path=file)
    except MisconfigurationException as caught:
        error = str(caught)
    else:
        error = "AdapterAveraging"
    assert any(name in error for name in states)
    assert all(value.isfinite().all() for value in weights(module).values())


@pytest.mark.parametrize(("part", "words"), [("E", "not finite"), ("step", "the saved step must be an integer >= 0")])
def test_a_state_that_would_train_on_with_nan_or_without_a_count_is_refused(
    good: Path, tmp_path: Path, part: str, words: str
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    state = checkpoint["callbacks"]["EFMLoRA"]
    if part == "E":
        next(iter(state["perturbation"]["E"].values()))[0] = torch.nan
    else:
        state["step"] = "6"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, module_of(), [EFMLoRA(0.5), saver(tmp_path)], ckpt_path=tmp_path / "other.ckpt")


def test_a_file_that_is_not_a_checkpoint_is_named_when_a_run_resumes(tmp_path: Path) -> None:
    file = tmp_path / "no.ckpt"
    file.write_text("hello")
    with pytest.raises(MisconfigurationException, match=r"no\.ckpt can't be loaded\. Is it damaged"):
        fit(tmp_path, Classifier(), [saver(tmp_path)], ckpt_path=file)


def test_another_rank_is_named_with_the_file(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), [saver(tmp_path)], max_epochs=1)
    file, words = tmp_path / "step=6.ckpt", r"step=6\.ckpt .* another rank, .*lora_A.*\[2, 6\].*\[5, 6\]"
    with pytest.raises(MisconfigurationException, match=f"(?s){words}"):
        load_adapter_checkpoint(Classifier(net=make_net(rank=5)), file)
    with pytest.raises(MisconfigurationException, match=f"(?s){words}"):
        fit(tmp_path, Classifier(net=make_net(rank=5)), [saver(tmp_path / "new")], ckpt_path=file)


def test_links_in_a_downloaded_folder_are_not_followed(tmp_path: Path) -> None:
    """A run that goes on in the folder would write its adapter over the files behind them."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    net: Any = make_net()
    net.add_adapter("two", copy.copy(net.peft_config["default"]))
    save = {"save_top_k": 0, "save_last": True, "every_n_train_steps": 6}
    fit(tmp_path, Classifier(net=net), [saver(run, **save)], max_epochs=1)
    place = run / "last" / "two"
    for file in place.iterdir():
        (victim / file.name).write_text("mine")
        file.unlink()
    place.rmdir()
    place.symlink_to(victim)
    fit(tmp_path, Classifier(net=net), [saver(run, **save)], ckpt_path=run / "last.ckpt")
    assert {file.read_text() for file in victim.iterdir()} == {"mine"}
    assert not place.is_symlink()
    assert (place / "adapter_model.safetensors").is_file()
