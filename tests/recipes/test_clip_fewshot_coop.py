"""CoOp's data sets, in the layout of its guide and with files in its schema: what is read, and what is refused."""

import json
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from clip_fewshot_runs import FILES, NAMES, picture, write_set
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import sources
from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.folders import PARTS

pytestmark = pytest.mark.usefixtures("command_line")


def data_of(root: Path, dataset: str, **options: Any) -> FewShotData:
    return FewShotData(**{"dataset": dataset, "root": str(root), "shots": 2, **options})


# -- what is read


@pytest.mark.parametrize("dataset", FILES)
def test_a_split_file_gives_parts_and_names(dataset: str, tmp_path: Path) -> None:
    split = json.loads(write_set(tmp_path, dataset).read_text())
    source = sources.load_source(dataset, str(tmp_path))
    for part, key in zip(PARTS, ("train", "val", "test"), strict=True):
        found = [
            (path.relative_to(tmp_path / FILES[dataset][0]).as_posix(), label) for path, label in source.parts[part]
        ]
        assert found == [(path, label) for path, label, _ in split[key]]
    assert all(path.is_file() for path, _ in chain.from_iterable(source.parts.values()))
    assert source.names == [name.replace("_", " ") for name in source.classes]


def test_aircraft_has_text_files(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    for number in range(12):
        picture(folder / "images" / f"{number:07d}.jpg", (9, 9, 99), number)
    (folder / "variants.txt").write_text("707-320\nDC-9-30\nF-16A/B\n")
    for part, first in (("train", 0), ("val", 4), ("test", 8)):
        names = ("DC-9-30", "707-320", "F-16A/B", "DC-9-30")
        lines = [f"{number:07d} {name}" for number, name in enumerate(names, first)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    source = sources.load_source("fgvc_aircraft", str(tmp_path))
    assert source.names == ["707-320", "DC-9-30", "F-16A/B"]
    assert [label for _, label in source.parts["validation"]] == [1, 0, 2, 1]
    (folder / "images" / "0000005.jpg").unlink()
    refused(tmp_path, "fgvc_aircraft", r"1 of its 12 images are not in .*0000005.jpg")
    (folder / "variants.txt").write_text("707-320\nDC-9-30\n")
    refused(tmp_path, "fgvc_aircraft", "'F-16A/B' is not in list")
    (folder / "variants.txt").unlink()
    refused(tmp_path, "fgvc_aircraft", "not laid out as in .*DATASETS.md.* No such file or directory: .*variants.txt")


def test_imagenet_has_folders_and_names_that_are_alike(tmp_path: Path) -> None:
    for seed, (part, number, folder) in enumerate(product(("train", "val"), range(4), ("n03773504", "n04008634"))):
        picture(tmp_path / "imagenet" / "images" / part / folder / f"{number}.JPEG", (9, 9, 99), seed)
    names = tmp_path / "imagenet" / "classnames.txt"
    names.write_text("n00000001 great white shark\nn03773504 missile\nn04008634 missile\n")
    data = data_of(tmp_path, "imagenet", validation_shots=2)
    data.setup("fit")
    assert data.prompts == [["a photo of a missile."]] * 2
    assert {path.parts[-3] for path, _ in data.parts["validation"]} == {"train"}
    assert {path.parts[-3] for path, _ in data.parts["test"]} == {"val"}
    assert not set(data.parts["train"]) & set(data.parts["validation"])
    names.write_text("n03773504 missile\n")
    refused(tmp_path, "imagenet", "KeyError: 'n04008634'")


def test_images_may_be_where_torchvision_puts_them(tmp_path: Path) -> None:
    write_set(tmp_path, "dtd", images="dtd/dtd/images")
    data = data_of(tmp_path, "dtd", templates="{} texture.")
    data.setup("fit")
    assert data.prompts == [[f"{name} texture."] for name in NAMES["dtd"]]
    assert [len(data.parts[part]) for part in PARTS] == [6, 6, 9]


# -- what is refused


def refused(root: Path, dataset: str, message: str, **options: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        data_of(root, dataset, **options).setup("fit")


def test_images_that_are_missing_or_broken_or_too_few_stop_a_run_before_training(tmp_path: Path) -> None:
    write_set(tmp_path, "eurosat")
    images = tmp_path / FILES["eurosat"][0]
    refused(tmp_path, "eurosat", "'Annual Crop Land' has 4 images in train .the parts that the data come", shots=5)
    broken = images / "class_1" / "eurosat_1_8.jpg"  # in the test part
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    refused(tmp_path, "eurosat", "1 of 9 images can't be read: .*eurosat_1_8.jpg")
    broken.unlink()
    refused(tmp_path, "eurosat", "1 of its 33 images are not in .*2750.*Add them")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split.pop("val"), "KeyError: 'val'"),
        (lambda split: split["train"].clear(), "no images in train .* of the classes Annual Crop Land, Forest, Sea"),
        (lambda split: split["test"].append(["a.jpg", 0, "other"]), "label 0 is both 'Annual Crop Land' and 'other'"),
    ],
)
def test_files_of_another_schema_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    file = write_set(tmp_path, "eurosat")
    split = json.loads(file.read_text())
    change(split)
    file.write_text(json.dumps(split))
    refused(tmp_path, "eurosat", message)
    file.unlink()
    refused(tmp_path, "eurosat", "files in .*eurosat are not laid out as in .*DATASETS.md.*split_zhou_EuroSAT.json")
