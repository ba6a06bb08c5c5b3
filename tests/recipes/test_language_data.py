"""Files that the language recipes read: prompts for `predict`, and tables."""

import json
from datetime import date
from pathlib import Path

import datasets
import fsspec
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from recipes.classification.data import TextData
from recipes.language.data import read_prompts
from recipes.nlg.data import MeaningData
from recipes.nlg.sources import read_pairs
from recipes.shared.data import read_table
from recipes.shared.table_files import files_of_csv_folder

pytestmark = pytest.mark.usefixtures("own_datasets")


@pytest.mark.parametrize(
    ("written", "encoding", "read"),
    [
        ("one\u2028line\n\n  another \r\n", "utf-8", ["one\u2028line", "another"]),  # of which Python would make three
        ("one\n", "utf-8-sig", ["one"]),
    ],
)
def test_prompts_are_the_lines_of_a_file(written: str, encoding: str, read: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(written, encoding=encoding)
    assert read_prompts(str(path), "prompt") == read
    path.write_text("Où?", encoding="latin-1")
    with pytest.raises(MisconfigurationException, match=r"prompts.txt is not in UTF-8, but perhaps in Latin-1"):
        read_prompts(str(path), "prompt")


def test_a_folder_of_csv_files_is_read_as_its_files_are(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "train.csv"
    file.write_text("question,answer\nNone,abc\nWhat is null?,NA\nn/a,007\n", encoding="utf-8")
    (file.parent / "test.csv").write_text("question\nNA\n", encoding="utf-8")  # without answers
    (file.parent / "README.md").write_text("# My notes\n", encoding="utf-8")
    table = read_table(str(file.parent), "train")
    assert table["question"][:] == ["None", "What is null?", "n/a"]
    assert table["answer"][:] == ["abc", "NA", "007"]
    assert read_table(str(file.parent), "test").to_list() == [{"question": "NA"}]
    assert len(read_table(str(file.parent), "train[:2]")) == 2


def test_own_splits_are_taken_where_nothing_else_is_given(tmp_path: Path) -> None:
    for name, kinds in {
        "whole": ("train", "validation", "test"),
        "half": ("train", "test"),
        "none": ("train",),
    }.items():
        for kind in kinds:
            file = tmp_path / name / f"{kind}.csv"
            file.parent.mkdir(exist_ok=True)
            file.write_text("mr,ref\n" + "\n".join(f"m{i},r{i}" for i in range(9)))
    for name, settings, splits, shares in (
        ("whole", {}, ("validation", "test"), (0, 0)),
        ("whole/{split}.csv", {}, ("validation", "test"), (0, 0)),
        ("whole", {"validation_share": 0.3}, (None, "test"), (0.3, 0)),  # what is asked for goes before what is there
        ("whole", {"test_share": 0.0, "validation_split": "train[:2]"}, ("train[:2]", None), (0, 0)),
        ("whole", {"split": "train+validation"}, (None, "test"), (0.05, 0)),
        ("half", {}, (None, "test"), (0.05, 0)),
        ("none", {}, (None, None), (0.05, 0)),
        ("none/train.csv", {"test_share": 0.2}, (None, None), (0.05, 0.2)),
    ):
        data = MeaningData(str(tmp_path / name), **settings)
        data.prepare_data()
        assert tuple(data.own_splits.values()) == splits, (name, settings)
        assert tuple(data.shares.values()) == shares, (name, settings)


@pytest.mark.parametrize("name", ["mine.csv", "mine.json", "mine.jsonl", "folder"])
@pytest.mark.filterwarnings("ignore")
def test_another_encoding_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    rows = [{"question": f"Où est {i}?", "answer": "là"} for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("mine.jsonl").write_text(lines, encoding="latin-1")
    Path("folder/train.jsonl").write_text(lines, encoding="latin-1")
    Path("mine.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="latin-1")
    Path("mine.csv").write_text("question,answer\nOù?,là\n", encoding="latin-1")
    with pytest.raises(MisconfigurationException, match=f"dataset='{name}' is not in UTF-8, but perhaps in Latin-1"):
        read_table(name, "train")


@pytest.mark.parametrize("name", ["./mine", "/no/where", "~/nowhere", "one/two/three", "mine/", "mine.txt"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="there is no such file or folder"):
        read_table(name, "train")


def test_names_of_columns_may_be_in_capitals(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("Text, LABEL,MR, Ref\na,b,c,d\ne,f,g,h\n")
    TextData(str(file)).prepare_data()
    assert read_pairs(read_table(str(file), "train"), "data") == [("c", "d", ()), ("g", "h", ())]


def test_a_folder_of_images_with_a_table_is_one_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,question\na.png,Why?\n", encoding="utf-8")
    assert files_of_csv_folder(datasets.load_dataset_builder(str(folder)), "train") is None


@pytest.mark.parametrize("name", ["dates.json", "dates.jsonl", "dates.jsonl.gz"])
def test_dates_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    for day in ("2020-01-01", "2021-01-01"):  # the file changes under its name
        rows = [{"answer": day, "choices": [day, "2020-01-02"], "more": [{"answer": day}], "n": 1}] * 2
        text = json.dumps(rows) if name == "dates.json" else "".join(json.dumps(row) + "\n" for row in rows)
        with fsspec.open(tmp_path / name, "wt", compression="infer") as file:
            file.write(text)
        assert read_table(str(tmp_path / name), "train").to_list() == rows
    (tmp_path / "folder").mkdir()
    (tmp_path / name).rename(tmp_path / "folder" / f"train{''.join(Path(name).suffixes)}")
    assert read_table(str(tmp_path / "folder"), "train").to_list() == rows


def test_times_of_a_parquet_file_stay_times(tmp_path: Path) -> None:
    rows = [{"day": date(2020, 1, 1), "text": "2020-01-01"}]
    (tmp_path / "mine").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine" / "train.parquet")
    for name in ("mine", "mine/train.parquet"):
        assert read_table(str(tmp_path / name), "train").to_list() == rows


def test_values_of_a_csv_file_stay_as_they_are_written(tmp_path: Path) -> None:
    """Numbers too, and in a column that has texts only after more rows than pandas judges it by."""
    file = tmp_path / "data [1]" / "sums.csv"  # the brackets are a pattern to those who expand names
    file.parent.mkdir()
    rows = [f"{i} + 0?,{i}.50" for i in range(10_001)]
    file.write_text("\n".join(["instruction,output", *rows, "who?,me"]), encoding="utf-8")
    outputs = read_table(str(file), "train")["output"][:]
    assert (outputs[0], outputs[10_000], outputs[10_001]) == ("0.50", "10000.50", "me")
