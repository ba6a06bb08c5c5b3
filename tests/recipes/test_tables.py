"""Tables that the recipes read through `datasets`: their files, what is kept of them, and what is not read."""

import gzip
import json
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.instruction_tuning import sources
from recipes.shared import data
from recipes.shared.parted_data import PartedData

pytestmark = pytest.mark.usefixtures("own_datasets")
ROWS = [{"question": f"What is {n}?", "answer": f"A number, {n}.", "source": "Numbers."} for n in range(3)]


def written(file: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return str(file)


@pytest.mark.parametrize("name", ["a.JSONL", "a.v2.jsonl.gz"])
def test_files_of_other_endings(tmp_path: Path, name: str) -> None:
    table = data.read_table(written(tmp_path / name), "train")
    assert table.to_list() == ROWS
    with pytest.raises(MisconfigurationException, match="is a file, and has no split 'test'"):
        data.read_table(str(tmp_path / name), "test")


@pytest.mark.parametrize(
    ("name", "split", "is_refused"),
    [
        ("test/mine.csv", "test", True),  # which the folder's name would let pass for a split
        ("mine.csv", "train", True),
        ("mine_{split}.csv", "train", True),
        ("mine.csv", "other.csv", False),
        ("nyu-mll/glue", "validation", False),
        ("nyu-mll/glue", None, False),
    ],
)
def test_no_part_is_read_from_where_training_is(name: str, split: str | None, is_refused: bool) -> None:
    for settings in ({"validation_split": split}, {"test_split": split}):
        refused = pytest.raises(MisconfigurationException, match="is read from where the training data are")
        with refused if is_refused else nullcontext():
            PartedData(name, **settings)._refuse_wrong_splits("fit")


def test_a_packaged_data_set_has_its_own_splits_alone() -> None:
    with pytest.raises(MisconfigurationException, match=r"sentiment' has no other splits than train, got 'test'"):
        PartedData("packaged:sentiment", test_split="test")._refuse_wrong_splits("test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n", r"a.tsv': of tables, files that end in .json, .* are read.*to_parquet"),
        ("keyed.json", json.dumps({str(n): {"question": "a"} for n in range(101)}), r"holds 101 objects by key, .*'0'"),
        # Few rows by their ids, as a part of GQA's questions, and a table as pandas writes it by default.
        ("gqa.json", '{"07": {"question": "a", "answer": "b"}, "08": {"question": "c", "answer": "d"}}', r"2 .*'07'"),
        ("pandas.json", '{"question": {"0": "a"}, "answer": {"0": "b"}}', r"'question', .*orient='records'"),
        ("saved/state.json", "{}", r"written by save_to_disk .*to_parquet"),
    ],
)
def test_forms_that_are_not_read_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(MisconfigurationException, match=message):
        data.read_table(str(file if file.parent == tmp_path else file.parent), "train")


@pytest.mark.parametrize("lines", [1, 2])
def test_lines_that_begin_with_an_object_are_read(lines: int, tmp_path: Path) -> None:
    rows = [{"a": {"b": 1}, "c": {"d": 2}}] * lines
    assert data.read_table(written(tmp_path / "rows.json", rows), "train").to_list() == rows


def noted(row: dict[str, Any], calls: str) -> dict[str, Any]:
    with Path(calls).open("a") as file:
        file.write("x")
    return {"more": row["question"] + "!"}


def test_an_update_of_the_code_converts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` knows a function of a module by its name alone."""
    table = data.read_table(written(tmp_path / "a.jsonl"), "train")
    calls = tmp_path / "calls"
    lengths = []
    for code in ("today's", "today's", "tomorrow's"):
        monkeypatch.setattr(data, "_code", lambda code=code: code)
        found = data.mapped(table, partial(noted, calls=str(calls)))
        assert found["more"][0] == "What is 0?!"
        lengths.append(len(calls.read_text()))
    assert 0 < lengths[0] == lengths[1] < lengths[2]


def test_columns_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path / "a.jsonl")
    with caplog.at_level(logging.INFO):
        sources.load(file, "train")
    assert "read are answer, question; left out are source" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sources.load(file, "train", columns={"question": "question", "answer": "answer"})
    assert "left out are" not in caplog.text
