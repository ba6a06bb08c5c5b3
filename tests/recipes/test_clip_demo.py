"""The CLIP demo on the real emoji, shortened: parts without leaks, training that resumes, a report that can be read."""

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
from recipes.clip_demo.__main__ import main
from recipes.clip_demo.run import ZERO_SHOT, Run, perform
from recipes.clip_fewshot.sources import load
from recipes.shared.ledger import Row
from recipes.shared.methods import OURS

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


# -- the demo


def command(folder: Path, *more: str) -> list[str]:
    return [
        f"--folder={folder}", "--shots", "2", "--seeds", "0", "1", "--iterations_per_shot=2", "--rho=1",
        "--pretraining_steps=2", *more,
    ]  # fmt: skip


def test_the_demo_reports_resumes_and_keeps(
    few: emoji.Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = tmp_path / "demo", tmp_path / "demo" / "results.jsonl"
    judged = {part: images[::20] for part, images in load(str(few.target)).parts.items()}
    monkeypatch.setattr(emoji, "prepare", lambda: few)
    monkeypatch.setattr("recipes.clip_demo.run.examples", lambda images, part: judged[part])
    monkeypatch.setattr("recipes.clip_demo.__main__.examples", lambda images, part: judged[part])
    begun: list[Run] = []

    def interrupted(run: Run) -> Row:
        begun.append(run)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return perform(run)

    with monkeypatch.context() as patch:
        patch.setattr("recipes.clip_demo.__main__.perform", interrupted)
        assert main(command(folder)) == 130
    assert "The same command resumes" in capsys.readouterr().out
    before = results.read_text()
    assert before.count("\n") == 2

    assert main(command(folder)) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert results.read_text().startswith(before)  # what was finished is kept
    assert len(rows) == 1 + len(OURS) * 2
    assert "[3/7]" in out
    assert "[1/7]" not in out
    table = (folder / "table.txt").read_text()
    assert all(method in table for method in (ZERO_SHOT, *OURS))
    assert {path.name for path in folder.glob("*.png")} == {"shots.png", "predictions.png"}
    given = {(row["method"], row["seed"]): tuple(row["given"]) for row in rows if row["shots"]}
    assert len(set(given.values())) == 2 * len(OURS)  # seeds and methods do something of their own
    assert main(command(folder)) == 0
    assert "/7]" not in capsys.readouterr().out  # nothing is run again
