"""Which images the few-shot recipe draws, what the classes are called, and the batches."""

import json
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_fewshot_runs import data_of, filled, picture
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from recipes.clip.images import image_files, read_image, readable
from recipes.clip_fewshot import sources
from recipes.clip_fewshot.batches import Images, InTurn, Stream
from recipes.clip_fewshot.data import few_shots
from recipes.clip_fewshot.folders import PARTS
from recipes.clip_fewshot.prompts import class_names, prompts

pytestmark = pytest.mark.usefixtures("command_line")


# -- which images


def test_parts_are_divided_by_class_and_seed(images: Path) -> None:
    one, again, other = (sources.load(str(images), split_seed=seed) for seed in (0, 0, 1))
    assert one.parts == again.parts != other.parts
    assert [len(one.parts[part]) for part in PARTS] == [18, 6, 12]
    every = list(chain.from_iterable(one.parts.values()))
    assert len({path for path, _ in every}) == 36
    assert {path.parent.name: label for path, label in every} == {"blue_grey": 0, "green": 1, "red": 2}


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing")])
def test_folders_of_parts_are_taken_as_they_are(names: tuple[str, ...], tmp_path: Path) -> None:
    for name, number in zip(names, (5, 3, 2), strict=True):
        filled(tmp_path / name, number)
    source = sources.load(str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [15, 9, 6]
    assert all(path.parts[-3] == names[1] for path, _ in source.parts["validation"])
    pooled = sources.load(str(tmp_path), split="seeded")
    assert [len(pooled.parts[part]) for part in PARTS] == [15, 6, 9]


def test_folders_that_are_no_part_are_named(tmp_path: Path) -> None:
    for part in ("train", "dev", "test", "unsorted"):
        filled(tmp_path / part, 2)
    with pytest.warns(UserWarning, match="the folders unsorted are no part and are left out"):
        source = sources.load(str(tmp_path))
    assert all(path.parts[-3] == "dev" for path, _ in source.parts["validation"])


def test_links_are_followed_once_and_all_endings_of_images_count(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("a.png", "deep/b.gif", "deep/c.jfif"):
        picture(elsewhere / name, (255, 0, 0), seed=0)
    (elsewhere / "deep" / "d.heic").write_bytes(b"of a telephone")
    for other in ("notes.pdf", "features.h5"):
        (elsewhere / "deep" / other).touch()
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    found = [str(path.relative_to(folder)) for path in image_files(folder)]
    assert found == ["linked/a.png", "linked/deep/b.gif", "linked/deep/c.jfif", "linked/deep/d.heic"]
    with pytest.raises(MisconfigurationException, match=r"1 of 4 images can't be read: .*d.heic"):
        readable(image_files(folder))


def test_a_message_does_not_hold_an_image_that_was_given_as_its_name() -> None:
    with pytest.raises(MisconfigurationException) as raised:
        readable(["A" * 100_000])
    assert len(str(raised.value)) < 1000


def test_grey_of_16_bits_is_scaled_and_32_bits_are_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "wide.png")
    read = np.asarray(read_image(tmp_path / "wide.png"))
    assert np.abs(read[..., 0] - values / 257).max() <= 1
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(MisconfigurationException, match=r"float.tif can't be read .* 32 bits a value \(mode F\)"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(MisconfigurationException, match="32 bits a value"):
        readable([tmp_path / "float.tif"])


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 6)


def test_fewer_shots_are_among_more(images: Path) -> None:
    source = sources.load(str(images))
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


def test_without_a_validation_part_the_rest_of_train_serves(tmp_path: Path) -> None:
    for part, number in (("train", 5), ("test", 2)):
        filled(tmp_path / part, number)
    source = sources.load(str(tmp_path))
    train, validation = few_shots(source, 3, 2, seed=0)
    assert len(set(train) | set(validation)) == 15
    assert few_shots(source, 1, 2, seed=0)[1] == validation
    with pytest.raises(
        MisconfigurationException, match=r"'blue_grey' has 1 images in train beside 4 .*lidation_shots=2"
    ):
        few_shots(source, 4, 2, seed=0)
    assert [len(few_shots(source, shots, None, seed=0)[1]) for shots in (1, 2, 3, 4, 5)] == [3, 6, 6, 3, 0]


def test_an_unreadable_image_is_named_or_another_is_drawn(images: Path, tmp_path: Path) -> None:
    filled(tmp_path, 12)
    source = sources.load(str(tmp_path))
    victim = few_shots(source, 2, 2, seed=0)[0][0][0]
    victim.write_bytes(victim.read_bytes()[:200])  # cut in the middle
    with pytest.raises(MisconfigurationException, match=rf"{victim.name} \(.*truncated.*skip_unreadable"):
        few_shots(source, 2, 2, seed=0)
    with pytest.warns(UserWarning, match=rf"skip_unreadable: 1 of 12 images can't be read: .*{victim.name}"):
        train, _ = few_shots(source, 2, 2, seed=0, skip_unreadable=True)
    assert [label for _, label in train] == [0, 0, 1, 1, 2, 2]
    assert victim not in [path for path, _ in train]
    with pytest.raises(MisconfigurationException, match=f"{victim.name} can't be read as an image"):
        read_image(victim)


# -- torchvision's data sets, as their archives lie on the disk


def test_eurosat(tmp_path: Path) -> None:
    for name in ("AnnualCrop", "SeaLake"):
        for i in range(10):
            picture(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.jpg", (9, 99, 9), i)
    source = sources.load("eurosat", str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [10, 4, 6]
    assert class_names(source.classes, None, "eurosat") == ["Annual Crop Land", "Sea or Lake"]
    assert "split_seed=0" in source.note


def test_dtd(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, number in (("train", 1), ("val", 2), ("test", 3)):
        names = [f"{name}/{name}_{part}{i}.jpg" for name, i in product(("banded", "dotted"), range(number))]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))
        for name in names:
            picture(base / "images" / name, (9, 9, 9), 0)
    source = sources.load("dtd", str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [2, 4, 6]
    assert source.parts["test"][3] == (base / "images" / "dotted" / "dotted_test0.jpg", 1)


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="torchvision's Flowers102 needs scipy")
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    labels = np.tile(np.arange(1, 103), 3)
    parts = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    scipy_io.savemat(base / "imagelabels.mat", {"labels": labels})
    scipy_io.savemat(base / "setid.mat", {name: np.array(ids) for name, ids in parts.items()})
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)  # compares checksums
    source = sources.load("flowers102", str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [102, 102, 102]
    assert source.parts["validation"][1] == (base / "jpg" / "image_00104.jpg", 1)
    assert class_names(source.classes, None, "flowers102")[1] == "hard-leaved pocket orchid"


def test_oxford_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    for part in ("trainval", "test"):
        first = 1 if part == "test" else 11
        lines = []
        for label, name in ((1, "Abyssinian"), (2, "great_dane")):
            lines += [f"{name}_{first} {label} 1 1", f"{name}_{first + 1} {label} 1 1"]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    source = sources.load("oxford_pets", str(tmp_path))
    assert {part: len(found) for part, found in source.parts.items()} == {"train": 4, "test": 4}
    assert list(source.classes) == ["Abyssinian", "Great Dane"]
    assert source.parts["test"][2] == (base / "images" / "great_dane_1.jpg", 1)


def test_caltech101(tmp_path: Path) -> None:
    base = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse"):
        for i in range(1, 5):
            picture(base / name / f"image_{i:04d}.jpg", (9, 9, 99), i)
    source = sources.load("caltech101", str(tmp_path))
    assert class_names(source.classes, None, "caltech101") == ["face", "airplane", "sea horse"]
    paths = [path for path, _ in chain.from_iterable(source.parts.values())]
    assert len(paths) == 12
    assert all(path.is_file() for path in paths)


def test_food101(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    (base / "images").mkdir()
    for part, first in (("train", 1), ("test", 7)):
        names = {name: [f"{name}/{first}", f"{name}/{first + 1}"] for name in ("apple_pie", "waffles")}
        (base / "meta" / f"{part}.json").write_text(json.dumps(names))
    source = sources.load("food101", str(tmp_path))
    assert {part: len(found) for part, found in source.parts.items()} == {"train": 4, "test": 4}
    assert source.parts["test"][2] == (base / "images" / "waffles" / "7.jpg", 1)
    assert class_names(source.classes, None, "food101") == ["apple pie", "waffles"]


def test_fgvc_aircraft(tmp_path: Path) -> None:
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nDC-9-30\n")
    for part, first in (("train", 1), ("val", 3), ("test", 5)):
        (base / f"images_variant_{part}.txt").write_text(f"{first} DC-9-30\n{first + 1} 707-320\n")
    source = sources.load("fgvc_aircraft", str(tmp_path))
    assert list(source.classes) == ["707-320", "DC-9-30"]
    assert source.parts["validation"] == [(base / "images" / "3.jpg", 1), (base / "images" / "4.jpg", 0)]


def test_sun397(tmp_path: Path) -> None:
    base = tmp_path / "SUN397"
    for folder in ("a/abbey", "a/apartment_building/outdoor"):
        for i in range(10):
            picture(base / folder / f"sun_{i}.jpg", (9, 99, 9), i)
    (base / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n")
    source = sources.load("sun397", str(tmp_path))
    assert [len(source.parts[part]) for part in PARTS] == [10, 4, 6]
    assert class_names(source.classes, None, "sun397") == ["abbey", "outdoor apartment building"]


# -- prompts


def test_prompts_fill_templates_with_readable_names() -> None:
    names = class_names(["AnnualCrop", "great_masterwort"], None, "folder")
    assert prompts(names, ["a {}.", "the {}."])[1] == ["a great masterwort.", "the great masterwort."]
    assert class_names(["a", "b"], {"b": "bee", "a": "ant"}, "folder") == ["ant", "bee"]


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
        assert [place for place, _ in chain.from_iterable(batches)] == [*range(23)]


def test_augmentation_depends_on_seed_and_draw_alone(images: Path) -> None:
    examples = sources.load(str(images)).parts["train"]

    def transform(image: Image.Image) -> Tensor:
        return torch.rand(2)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    batch = Images(examples, transform, seed=1)[[(0, 7), (0, 8), (1, 7)]]
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers are touched
    assert torch.equal(batch["images"][0], batch["images"][2])
    assert not torch.equal(batch["images"][0], batch["images"][1])
    assert not torch.equal(Images(examples, transform, seed=2)[[(0, 7)]]["images"], batch["images"][:1])


def test_unreadable_test_images_stop_a_run_before_training(images: Path, tmp_path: Path) -> None:
    filled(tmp_path, 12)
    victim = sources.load(str(tmp_path)).parts["test"][0][0]
    victim.write_text("no image")
    with pytest.raises(MisconfigurationException, match=rf"1 of 12 images can't be read: .*{victim.name}"):
        data_of(tmp_path).setup("fit")
    data = data_of(tmp_path, skip_unreadable=True)
    with pytest.warns(UserWarning, match=victim.name):
        data.setup("fit")
    assert len(data.parts["test"]) == 11
