"""The small CLIP for the packaged emoji: parts without leaks, and a training run that resumes."""

import csv
import signal
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip.model import load_clip, text_features
from recipes.clip_contrastive.module import ContrastiveModel
from recipes.offline import emoji
from recipes.pretrain.clip import main

pytestmark = pytest.mark.usefixtures("command_line")
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def data() -> emoji.Folders:
    return emoji.prepare()


@pytest.fixture(scope="module")
def cache(data: emoji.Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the emoji, but without a model."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "emoji").symlink_to(data.pairs.parent)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATLORA_CACHE", str(cache))


def codes(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.png")}


def pairs(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_no_emoji_is_in_two_parts(data: emoji.Folders) -> None:
    target = [set(map(emoji.variants, codes(data.target / part))) for part in PARTS]
    trained = {emoji.variants(Path(row["image"]).stem) for row in pairs(data.pairs)}
    held_out = {emoji.variants(Path(row["image"]).stem) for row in pairs(data.held_out_pairs)}
    train, validation, test = target
    assert len(train & trained) > 700  # if keys never matched, the test would show nothing
    assert not trained & (validation | test | held_out)
    assert not test & (train | validation)
    assert not train & validation
    assert validation <= held_out


def test_variants_of_an_emoji_are_one() -> None:
    runners = ["1f3c3", "1f3c3-200d-2642-fe0f", "1f3c3-1f3fd-200d-2640-fe0f", "1f3c3-200d-27a1-fe0f"]
    assert len({emoji.variants(code) for code in runners}) == 1
    assert emoji.variants("1f469-200d-1f680") == emoji.variants("1f468-1f3ff-200d-1f680")  # astronauts
    assert emoji.variants("1f469-200d-1f680") != emoji.variants("1f469-200d-1f692")  # and a firefighter


def test_a_stopped_training_goes_on(data: emoji.Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = []
    for file in (data.pairs, data.held_out_pairs):
        lines = [f"{file.parent / row['image']},{row['caption']}\n" for row in pairs(file)[::100][:40]]
        few.append(tmp_path / file.name)
        few[-1].write_text("image,caption\n" + "".join(line for line in lines if line.count(",") == 1))
    monkeypatch.setattr(emoji, "prepare", lambda: emoji.Folders(*few, data.target))
    plain, steps = ContrastiveModel.training_step, []

    def stopping(self: ContrastiveModel, batch: Any, batch_idx: int) -> torch.Tensor:
        steps.append(self.global_step)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(ContrastiveModel, "training_step", stopping)
    options = ["--data.batch_size=4", "--trainer.max_steps=5", "--trainer.val_check_interval=5"]
    with pytest.raises(SystemExit):
        main(options)
    folder = main(options)
    assert steps == [0, 1, 2, 3, 4]
    assert main([]) == folder
    with pytest.raises(MisconfigurationException, match=r"already, in .*emoji-clip, .*=4 .*: delete this folder"):
        main(options)
    assert len(steps) == 5  # nothing is trained again
    assert not folder.with_name("emoji-clip-training").exists()  # from it, another model could resume

    ours = load_clip(f"local-dir:{folder}")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["dog, mammal"])
    assert tokens.shape == (1, 16)
    torch.testing.assert_close(text_features(ours.net.eval(), tokens), text_features(model.eval(), tokens))
