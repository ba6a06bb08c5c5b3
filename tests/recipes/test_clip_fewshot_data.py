"""Which images the few-shot recipe draws, what the classes are called, and the batches."""

import logging
from contextlib import nullcontext
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clip_fewshot_runs import data_of, filled, picture
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from recipes.clip.images import image_files, read_image, readable
from recipes.clip_fewshot import sources
from recipes.clip_fewshot.batches import Images, InTurn, Stream
from recipes.clip_fewshot.data import FewShotData, few_shots
from recipes.clip_fewshot.folders import PARTS

pytestmark = pytest.mark.usefixtures("command_line")


# -- which images


def test_parts_are_divided_by_class_and_seed(images: Path) -> None:
    one, again, other = (sources.load_source(str(images), split_seed=seed) for seed in (0, 0, 1))
    assert one.parts == again.parts != other.parts
    assert [len(one.parts[part]) for part in PARTS] == [18, 6, 12]
    every = list(chain.from_iterable(one.parts.values()))
    assert len({path for path, _ in every}) == 36
    assert {path.parent.name: label for path, label in every} == {"blue_grey": 0, "green": 1, "red": 2}


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing")])
def test_folders_of_parts_are_taken_as_they_are(names: tuple[str, ...], tmp_path: Path) -> None:
    for name, number in zip(names, (5, 3, 2), strict=True):
        filled(tmp_path / name, number)
    source = sources.load_source(str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [15, 9, 6]
    assert all(path.parts[-3] == names[1] for path, _ in source.parts["validation"])
    pooled = sources.load_source(str(tmp_path), split="seeded")
    assert [len(pooled.parts[part]) for part in PARTS] == [15, 6, 9]


def test_classes_are_printed_and_images_may_be_in_folders_within_them(tmp_path: Path, caplog: Any) -> None:
    for seed, (name, i) in enumerate(product(("animal/cat", "plant/rose", "stone", "stone/odd"), range(4))):
        picture(tmp_path / name / f"{i}.png", (20 * i, 0, 99), seed)
    with caplog.at_level(logging.INFO):
        data_of(tmp_path, shots=1).setup("fit")
    assert "3 classes, animal, plant, stone; images" in caplog.text


def test_equal_images_in_two_parts_are_counted(tmp_path: Path) -> None:
    filled(tmp_path / "train", 3)
    filled(tmp_path / "test", 3)
    picture(tmp_path / "test" / "red" / "00.png", (9, 99, 99), seed=5)
    with pytest.warns(UserWarning, match="test: 8 of 9 images are in the training split too"):
        data_of(tmp_path, shots=3).setup("fit")


@pytest.mark.parametrize("options", [{"split": "seeded"}, {"split_seed": 1}, {"dataset": "other", "split_seed": 1}, {}])
def test_a_checkpoint_is_not_tested_on_another_division_of_its_images(options: dict[str, Any]) -> None:
    data = FewShotData(**{"dataset": "./mine"} | options)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))
    is_refused = options and "dataset" not in options
    message = "images may be tested on which it was trained: give --data.split official, --data.split_seed 0"
    with pytest.raises(MisconfigurationException, match=message) if is_refused else nullcontext():
        data._refuse_trained_rows(FewShotData("./mine")._trained_on())


def test_links_are_followed_and_the_common_endings_of_images_count(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("a.png", "deep/b.gif", "deep/c.jfif"):
        picture(elsewhere / name, (255, 0, 0), seed=0)
    (elsewhere / "deep" / "d.heic").write_bytes(b"of a telephone")
    for other in ("notes.pdf", "features.h5"):
        (elsewhere / "deep" / other).touch()
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    found = [str(path.relative_to(folder)) for path in image_files(folder)]
    assert found == ["linked/a.png", "linked/deep/b.gif", "linked/deep/c.jfif", "linked/deep/d.heic"]
    with pytest.raises(MisconfigurationException, match=r"1 of 4 images can't be read: .*d.heic"):
        readable(image_files(folder))


@pytest.mark.parametrize(("kind", "name"), [(np.uint16, "wide.png"), (np.float32, "float.tif")])
def test_more_than_8_bits_are_refused(kind: Any, name: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / name)
    with pytest.raises(MisconfigurationException, match=f"{name} can't be read .* more than 8 bits per channel"):
        read_image(tmp_path / name)
    with pytest.raises(MisconfigurationException, match="more than 8 bits per channel"):
        readable([tmp_path / name])


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: must be rotated by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 6)


def test_fewer_shots_are_among_more(images: Path) -> None:
    source = sources.load_source(str(images))
    drawn = {shots: few_shots(source, shots, 2, seed=3) for shots in (1, 2, 4)}
    assert set(drawn[1][0]) < set(drawn[2][0]) < set(drawn[4][0])
    for shots, (train, validation) in drawn.items():
        assert [label for _, label in train] == sorted([0, 1, 2] * shots)
        assert [label for _, label in validation] == [0, 0, 1, 1, 2, 2]
        assert not set(train) & set(validation)
        assert set(train) <= set(source.parts["train"])
        assert set(validation) <= set(source.parts["validation"])
    assert few_shots(source, 2, 2, seed=3) == drawn[2]
    assert few_shots(source, 2, 2, seed=4) != drawn[2]


@pytest.mark.parametrize("tested", ["test", "val"])  # ImageNet has only the second
def test_without_a_validation_part_the_rest_of_train_serves(tested: str, tmp_path: Path) -> None:
    for part, number in (("train", 5), (tested, 2)):
        filled(tmp_path / part, number)
    source = sources.load_source(str(tmp_path))
    assert [path.parts[-3] for path, _ in source.parts["test"]] == 6 * [tested]
    train, validation = few_shots(source, 3, 2, seed=0)
    assert len(set(train) | set(validation)) == 15
    assert few_shots(source, 1, 2, seed=0)[1] == validation
    with pytest.raises(MisconfigurationException, match=r"'blue_grey' has 1 images in train beside 4 .*shots=2"):
        few_shots(source, 4, 2, seed=0)
    assert [len(few_shots(source, shots, None, seed=0)[1]) for shots in (1, 2, 3, 4, 5)] == [3, 6, 6, 3, 0]


def test_an_unreadable_image_is_named_or_another_is_drawn(images: Path, tmp_path: Path) -> None:
    filled(tmp_path, 12)
    source = sources.load_source(str(tmp_path))
    victim = few_shots(source, 2, 2, seed=0)[0][0][0]
    victim.write_bytes(victim.read_bytes()[:200])  # truncated
    with pytest.raises(MisconfigurationException, match=rf"{victim.name} \(.*truncated.*skip_unreadable"):
        few_shots(source, 2, 2, seed=0)
    with pytest.warns(UserWarning, match=rf"skip_unreadable: 1 of 12 images can't be read: .*{victim.name}"):
        train, _ = few_shots(source, 2, 2, seed=0, skip_unreadable=True)
    assert [label for _, label in train] == [0, 0, 1, 1, 2, 2]
    assert victim not in [path for path, _ in train]
    with pytest.raises(MisconfigurationException, match=f"{victim.name} can't be read as an image"):
        read_image(victim)


# -- batches


def test_a_stream_uses_each_example_as_often_and_all_batches_are_full() -> None:
    stream = Stream(10, batch_size=4, batches=25, seed=1)
    batches = list(stream)
    assert [len(batch) for batch in batches] == [4] * 25 == [4] * len(stream)
    drawn = [example for example, _ in chain.from_iterable(batches)]
    assert sorted(drawn) == sorted([*range(10)] * 10)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == [*range(10)]
    assert drawn[:10] != drawn[10:20]
    assert [number for _, number in chain.from_iterable(batches)] == [*range(100)]
    stream.set_epoch(1)
    assert next(iter(stream))[0][1] == 100
    assert [len(batch) for batch in Stream(3, batch_size=8, batches=2)] == [3, 3]


def test_ranks_share_what_one_rank_would_see() -> None:
    alone = list(Stream(10, batch_size=8, batches=5, seed=1))
    shares = [list(Stream(10, batch_size=4, batches=5, seed=1, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shares, strict=True)] == alone
    for ranks in (1, 2, 3, 7):
        turns = [list(InTurn(23, 4, ranks, rank)) for rank in range(ranks)]
        assert len({len(turn) for turn in turns}) == 1
        batches = chain.from_iterable(zip(*turns, strict=True))
        assert [index for index, _ in chain.from_iterable(batches)] == [*range(23)]


def test_augmentation_depends_on_seed_and_draw_alone(images: Path) -> None:
    examples = sources.load_source(str(images)).parts["train"]

    def transform(image: Image.Image) -> Tensor:
        return torch.rand(2)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    batch = Images(examples, transform, seed=1)[[(0, 7), (0, 8), (1, 7)]]
    assert torch.equal(torch.rand(1), expected)  # no other random numbers are affected
    assert torch.equal(batch["images"][0], batch["images"][2])
    assert not torch.equal(batch["images"][0], batch["images"][1])
    assert not torch.equal(Images(examples, transform, seed=2)[[(0, 7)]]["images"], batch["images"][:1])


def test_unreadable_test_images_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    victim = sources.load_source(str(filled(tmp_path, 12))).parts["test"][0][0]
    victim.write_text("no image")
    data = data_of(tmp_path, skip_unreadable=True)
    with pytest.warns(UserWarning, match=victim.name):
        data.setup("fit")
    assert len(data.parts["test"]) == 11
