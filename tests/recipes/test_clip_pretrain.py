"""The small CLIP of the packaged emoji: parts without leaks, and a training that resumes."""

import csv
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from recipes.clip import emoji
from recipes.clip.model import load_clip, text_features
from recipes.clip_contrastive.module import ContrastiveModel
from recipes.clip_contrastive.pretrain import Pretraining, pretrained

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def data() -> emoji.Folders:
    return emoji.prepare()


@pytest.fixture(scope="module")
def cache(data: emoji.Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the emoji, but no model."""
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


# -- data


def test_no_emoji_is_in_two_parts(data: emoji.Folders) -> None:
    target = [set(map(emoji.variants, codes(data.target / part))) for part in PARTS]
    trained = {emoji.variants(Path(row["image"]).stem) for row in pairs(data.pairs)}
    held_out = {emoji.variants(Path(row["image"]).stem) for row in pairs(data.held_out_pairs)}
    train, validation, test = target
    assert len(train & trained) > 700  # keys that never meet would show nothing
    assert not trained & (validation | test | held_out)
    assert not test & (train | validation)
    assert not train & validation
    assert validation <= held_out


def test_variants_of_an_emoji_are_one() -> None:
    runners = ["1f3c3", "1f3c3-200d-2642-fe0f", "1f3c3-1f3fd-200d-2640-fe0f", "1f3c3-200d-27a1-fe0f"]
    assert len({emoji.variants(code) for code in runners}) == 1
    assert emoji.variants("1f469-200d-1f680") == emoji.variants("1f468-1f3ff-200d-1f680")  # astronauts
    assert emoji.variants("1f469-200d-1f680") != emoji.variants("1f469-200d-1f692")  # and a firefighter


# -- the model


@pytest.fixture
def few(data: emoji.Folders, tmp_path: Path) -> emoji.Folders:
    """Forty pairs of each part, by the images' whole paths."""
    made = []
    for file in (data.pairs, data.held_out_pairs):
        with (tmp_path / file.name).open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["image", "caption"])
            writer.writerows([file.parent / row["image"], row["caption"]] for row in pairs(file)[::100][:40])
        made.append(tmp_path / file.name)
    return emoji.Folders(*made, data.target)


def test_a_stopped_training_goes_on(few: emoji.Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Pretraining(steps=5, batch_size=4)
    monkeypatch.setattr("recipes.clip_contrastive.pretrain._CHECKPOINT_STEPS", 2)
    plain, steps = ContrastiveModel.training_step, []

    def stopping(self: ContrastiveModel, batch: Any, batch_idx: int) -> torch.Tensor:
        steps.append(self.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(ContrastiveModel, "training_step", stopping)
    with pytest.raises(SystemExit):
        pretrained(settings, few)
    folder = pretrained(settings, few)
    assert steps == [0, 1, 2, 3, 2, 3, 4]  # from the checkpoint of step 2

    scores = json.loads((folder / "pretraining.json").read_text())
    assert 0 <= scores["val_image_to_text_recall@1"] <= 1
    assert not (folder / "training").exists()
    assert pretrained(settings, few) == folder
    assert len(steps) == 7  # nothing is trained again

    ours = load_clip(f"local-dir:{folder}")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["dog, mammal"])
    assert tokens.shape == (1, 16)
    torch.testing.assert_close(text_features(ours.net.eval(), tokens), text_features(model.eval(), tokens))
