"""Files that the language recipes read: prompts for `predict`, and tables."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.reading import read_table
from recipes.language.data import read_prompts
from recipes.nlg.data import MeaningData

pytestmark = pytest.mark.usefixtures("own_datasets")


@pytest.mark.parametrize(
    ("written", "encoding", "read"),
    [
        ("one\u2028line\n\n  another \r\n", "utf-8", ["one\u2028line", "another"]),  # Python would split it into three
        ("one\n", "utf-8-sig", ["one"]),
    ],
)
def test_prompts_are_the_lines_of_a_file(written: str, encoding: str, read: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(written, encoding=encoding)
    assert read_prompts(str(path), "prompt") == read
    path.write_text("Où?", encoding="latin-1")
    with pytest.raises(MisconfigurationException, match=r"prompts.txt is not in UTF-8"):
        read_prompts(str(path), "prompt")


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
        ("whole", {"validation_share": 0.3}, (None, "test"), (0.3, 0)),  # settings override existing splits
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


@pytest.mark.parametrize("name", ["./mine", "/no/where", "~/nowhere", "one/two/three"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"is neither a folder nor a file|find any data file"):
        read_table(name, "train")


def test_a_missing_file_of_prompts_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"--data\.prompts nope\.txt: there is no such file"):
        read_prompts("nope.txt", "prompt")


def test_a_table_is_not_read_as_prompts(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(MisconfigurationException, match=r"asked\.jsonl is a table: give a text file with one meaning"):
        read_prompts(str(path), "meaning")
