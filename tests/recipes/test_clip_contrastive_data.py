"""Sources of images and captions, how they are divided into parts, and their batches."""

import csv
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from clip_contrastive_runs import prepared
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_contrastive import sources
from recipes.clip_contrastive.batches import Draw, PictureBatchSampler
from recipes.clip_contrastive.data import ContrastiveData
from recipes.clip_contrastive.sources import Picture
from recipes.offline import emoji

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

COLUMNS = ("image", "caption")


# -- sources of images and captions


def described(dataset: str, **columns: str) -> dict[str, tuple[str, ...]]:
    return {Path(str(p.file)).stem: p.captions for p in sources.load_pictures(dataset, **columns)}


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[tuple[str, ...]], name: str = "table.csv", header: tuple[str, ...] = COLUMNS) -> str:
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(tmp_path / name)

    return write


def write_shard(shard: Path, members: dict[str, Path | bytes]) -> None:
    """Write an archive of files, given by name as paths or as contents."""
    with tarfile.open(shard, "w") as archive:
        for name, content in members.items():
            whole = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(whole)
            archive.addfile(member, io.BytesIO(whole))


def table_rows(pictures: str, captions: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """A table's rows: each picture's file with each of its captions."""
    rows = []
    for name, texts in captions.items():
        rows += [(str(Path(pictures) / f"{name}.png"), text) for text in texts]
    return rows


def test_all_sources_give_the_same_pictures(pictures: str, write_table: Callable[..., str], tmp_path: Path) -> None:
    expected = described(pictures)
    assert len(expected) == 32
    assert expected["red-circle"] == ("a red circle", "the circle is red")
    rows = table_rows(pictures, expected)
    assert described(write_table(rows)) == expected
    other = write_table([("x", *row) for row in rows], "other.csv", ("image", "photo", "said"))
    assert described(other, image_column="photo", caption_column="said") == expected
    names = sorted(expected)
    for number, share in enumerate((names[:20], names[20:])):
        files = [Path(pictures) / f"{name}.{suffix}" for name in share for suffix in ("png", "txt")]
        members = {file.name: file for file in files} | {"._a.png": files[0]}  # as macOS adds to archives
        write_shard(tmp_path / f"shard-{number:03d}.tar", members)
    shards = sources.load_pictures(str(tmp_path / "shard-*.tar"))
    assert [picture.captions for picture in shards] == [expected[name] for name in names]
    assert shards[21].file.read() == (Path(pictures) / f"{names[21]}.png").read_bytes()


def test_what_datasets_reads_gives_the_same_pictures(pictures: str, tmp_path: Path) -> None:
    expected = described(pictures)
    paths = {name: str(Path(pictures) / f"{name}.png") for name in expected}
    rows = [{"filepath": path, "title": expected[name][0]} for name, path in paths.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = {name: texts[:1] for name, texts in expected.items()}
    assert described(str(tmp_path / "rows.jsonl")) == first
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    for path in paths.values():
        shutil.copy(path, folder / "train")
    named = [{"file_name": Path(row["filepath"]).name, "text": row["title"]} for row in rows]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    assert described(str(folder)) == first


def test_images_inside_of_a_hub_data_set_are_known_by_their_content(clip: Any, pictures: str, tmp_path: Path) -> None:
    """An image in two rows is one picture; the data set's own validation split is used."""
    features = {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    names = sorted(described(pictures))
    for split, some in (("train", names[:24]), ("validation", names[24:])):
        rows = []
        for name in [*some, some[0]]:
            image = {"path": None, "bytes": (Path(pictures) / f"{name}.png").read_bytes()}
            rows.append({"image": image, "caption": [f"a {name}", f"the {name}"]})
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    data = prepared(clip, "fit", str(tmp_path / "hub"), num_workers=1)
    assert {part: len(found) for part, found in data.parts.items()} == {"train": 24, "validation": 8}
    twice = [picture for picture in data.parts["train"] if len(picture.captions) == 4]
    assert [picture.captions[0] for picture in twice] == [f"a {names[0]}"]
    (batch,) = list(data.val_dataloader())
    assert batch["images"].shape == (8, 3, 32, 32)
    assert len(next(iter(data.train_dataloader()))["images"]) == 24


def test_images_are_read_from_shards(clip: Any, pictures: str, tmp_path: Path) -> None:
    blue, red = (Path(pictures) / f"{colour}-circle.png" for colour in ("blue", "red"))
    images: dict[str, Path | bytes] = {blue.name: blue, red.name: red, "broken.png": red.read_bytes()[:60]}
    members = {}
    for name, image in images.items():
        members |= {name: image, name.replace(".png", ".txt"): b"a circle"}
    write_shard(tmp_path / "shard.tar", members)
    with pytest.raises(
        MisconfigurationException, match=r"1 of 3 images can't be read: shard.tar, row 2 .*skip_unreadable"
    ):
        prepared(clip, "fit", "shard.tar", validation_share=0.0, test_share=0.0)
    with pytest.warns(UserWarning, match=r"1 of 3 images can't be read: shard.tar, row 2 .*left out"):
        data = prepared(clip, "fit", "shard.tar", skip_unreadable=True, validation_share=0.0, test_share=0.0)
    files = [str(picture.file) for picture in data.parts["train"]]
    batch = data.train_dataloader().dataset[Draw(0, [files.index("shard.tar, row 0")])]
    assert batch["images"].shape == (1, 3, 32, 32)
    assert batch["images"][0, 2].mean() > batch["images"][0, 0].mean()


def test_an_emoji_stays_in_one_part_in_all_styles(
    pictures: str, write_table: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for style in ("google", "twitter", "fluent/train/face"):
        (tmp_path / style).mkdir(parents=True)
        for code in ("1f600", "1f601"):
            shutil.copy(Path(pictures) / "red-circle.png", tmp_path / style / f"{code}.png")
    rows = [(f"{style}/1f600.png", "grin") for style in ("google", "twitter")]
    folders = emoji.Folders(Path(write_table(rows)), Path(write_table(rows[:1], "held.csv")), tmp_path / "fluent")
    monkeypatch.setattr(emoji, "prepare", lambda: folders)
    assert [(p.key, p.captions) for p in sources.load_pictures("packaged:emoji")] == [("1f600", ("grin",))] * 2
    assert len(sources.load_pictures("packaged:emoji-held-out")) == 1
    (fluent,) = sources.load_pictures("packaged:emoji-fluent")  # the held-out emoji has no caption
    assert fluent == Picture(tmp_path / "fluent/train/face/1f600.png", ("grin",), "1f600")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a.png", "b")], ("file", "caption"), r"columns \['file', 'caption'\], but not image_column, one of image"),
        ([("nowhere.png", "x")], COLUMNS, "there is no .*nowhere.png"),
    ],
)
def test_faults_of_a_table_are_named(rows: Any, header: Any, message: str, write_table: Callable[..., str]) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        sources.load_pictures(write_table(rows, header=header))


def test_faults_of_a_folder_are_named(pictures: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(Path(pictures) / "red-circle.png", folder / "one.png")
    with pytest.raises(MisconfigurationException, match=r"needs a .txt file next to each, or a metadata"):
        sources.load_pictures(str(folder))
    (folder / "two.txt").write_text("a circle")
    for name in ("two.png", "._two.png", ".ipynb_checkpoints/two.png", "__MACOSX/two.png"):  # the first is a picture
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(pictures) / "red-circle.png", folder / name)
    for text in (None, " \n"):
        if text is not None:
            (folder / "one.txt").write_text(text)
        with pytest.warns(UserWarning, match=r"folder': 1 of 2 rows can't be used: .*one.png has no caption"):
            assert [picture.key for picture in sources.load_pictures(str(folder))] == ["two.png"]
    (folder / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(MisconfigurationException, match=r"one.txt is not in UTF-8"):
        sources.load_pictures(str(folder))


def test_a_file_given_as_a_split_is_that_parts_data(clip: Any, pictures: str, write_table: Callable[..., str]) -> None:
    rows = table_rows(pictures, described(pictures))
    table, held_out = write_table(rows[6:]), write_table(rows[:6], "held_out.csv")
    found = []
    for options in ({"test_split": held_out}, {"test_dataset": held_out}):
        data = prepared(clip, "test", table, **options)
        found.append([picture.file for picture in data.parts["test"]])
    assert found[0] == found[1]
    assert len(found[0]) < 7
    with pytest.raises(MisconfigurationException, match=r"nowhere\.csv': there is no such file"):
        prepared(clip, "fit", table, validation_split="nowhere.csv")


def test_parts_in_folders_with_texts_are_named_one_by_one(clip: Any, pictures: str, tmp_path: Path) -> None:
    for part in ("train", "Test"):
        shutil.copytree(pictures, tmp_path / "all" / part)
    with pytest.raises(MisconfigurationException, match="no split 'train', but has the folders Test, train: give one"):
        prepared(clip, "fit", str(tmp_path / "all"))
    with pytest.raises(MisconfigurationException, match="which has no split 'test': give one folder as dataset"):
        prepared(clip, "test", pictures, test_split="test")
    data = prepared(clip, "test", str(tmp_path / "all" / "train"), test_dataset=str(tmp_path / "all" / "Test"))
    assert {Path(str(picture.file)).parent.name for picture in data.parts["test"]} == {"Test"}


def test_an_image_that_is_written_in_two_ways_is_one_picture(pictures: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(Path(pictures) / "red-circle.png")
    absolute = tmp_path / "some" / ".." / "a.png"
    (tmp_path / "table.csv").write_text(f"image,caption\na.png,one\n./a.png,two\n{absolute},three\n")
    (picture,) = sources.load_pictures(str(tmp_path / "table.csv"))
    assert picture == Picture(tmp_path / "a.png", ("one", "two", "three"), "a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": None}, "no data: give a file"),
        ({"dataset": "no-*.tar"}, r"no-\*.tar'.* can't be read: .*there is no such file"),
        ({"dataset": "packaged:chess"}, "unknown packaged task 'chess', give one of packaged:emoji"),
        ({"test_dataset": "a.csv", "test_split": "test"}, "test_dataset and test_split both choose the test data"),
        (
            {"dataset": "data.csv", "test_dataset": "./data.csv"},
            "'./data.csv' is where the training data come from: give another test_dataset",
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, clip: Any, pictures: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared(clip, "fit", **{"dataset": pictures} | options)


# -- parts and batches


def test_no_image_is_on_two_sides_and_none_moves_when_the_data_grow(
    clip: Any, pictures: str, write_table: Callable[..., str]
) -> None:
    rows = table_rows(pictures, described(pictures))

    def parts(rows: list[tuple[str, str]], **options: Any) -> dict[str, set[str]]:
        data = prepared(clip, "fit", write_table(rows), validation_share=0.25, test_share=0.1, **options)
        data.setup("test")
        return {part: {str(picture.file) for picture in chosen} for part, chosen in data.parts.items()}

    found = parts(rows)
    assert sum(len(files) for files in found.values()) == 32 == len(set.union(*found.values()))
    assert len(found["train"]) > len(found["validation"]) > len(found["test"]) > 0
    assert parts(random.sample(rows, len(rows))) == found
    assert parts(rows, seed=1) != found
    for fewer in (36, 44, 52, 60):
        before = parts(rows[-fewer:])
        assert all(before[part] <= found[part] for part in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_dataset": "held_out.csv"}, None),
        ({"test_dataset": "./my.csv"}, "the checkpoint's run was trained on './my.csv'"),
        ({"test_split": "train"}, "the checkpoint's run was trained on"),
        ({"test_share": 0.2}, None),
        (
            {"test_share": 0.2, "seed": 1},
            r"except for the shares \{'validation': 0.05, 'test': 0.2\}, seed 0: give these",
        ),
        ({"dataset": "other.csv", "test_share": 0.2, "seed": 1}, None),
    ],
)
def test_a_checkpoint_is_judged_on_other_data_than_it_was_trained_on(
    options: dict[str, Any], message: str | None
) -> None:
    trained = ContrastiveData("my.csv", test_share=options.get("test_share"))
    data = ContrastiveData(**{"dataset": "my.csv"} | options)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))
    with pytest.raises(MisconfigurationException, match=message) if message else nullcontext():
        data._refuse_trained_rows(trained._trained_on())


def test_ranks_share_each_joint_batch() -> None:
    one = list(PictureBatchSampler(50, 8, seed=3))
    shares = [list(PictureBatchSampler(50, 4, seed=3, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [len(draw.indices) for draw in one] == [8] * 6
    assert [[*a.indices, *b.indices] for a, b in zip(*shares, strict=True)] == [draw.indices for draw in one]
    assert len(PictureBatchSampler(50, 4, num_replicas=2)) == len(shares[0])
    few = [list(PictureBatchSampler(5, 4, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [len(draw.indices) for draw in chain.from_iterable(few)] == [2, 2]
    sampler = PictureBatchSampler(50, 8, seed=3)
    sampler.set_epoch(1)
    assert next(iter(sampler)) != one[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_an_evaluation_sees_each_picture_once_on_any_number_of_ranks(ranks: int) -> None:
    shares = [list(PictureBatchSampler(10, 3, num_replicas=ranks, rank=rank, shuffle=False)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert len(PictureBatchSampler(10, 3, num_replicas=ranks, shuffle=False)) == len(shares[0])
    draws = chain.from_iterable(zip(*shares, strict=True))
    seen = chain.from_iterable(draw.indices for draw in draws if not draw.repeats)
    assert list(seen) == list(range(10))


def test_captions_and_crops_depend_on_seed_epoch_and_place_alone(clip: Any, pictures: str) -> None:
    batches = prepared(clip, "fit", pictures).train_dataloader().dataset
    state = random.getstate(), torch.get_rng_state()
    two, one = batches[Draw(4, [2, 5])], batches[Draw(4, [5])]
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    again = batches[Draw(4, [2, 5])]
    for name, value in two.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[1:], one[name])
    later = [batches[Draw(epoch, [2])] for epoch in range(6)]
    assert len({batch["images"].sum().item() for batch in later}) > 3
    assert len({tuple(batch["tokens"].flatten().tolist()) for batch in later}) == 2
