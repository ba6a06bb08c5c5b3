"""Tables that the recipes read with `datasets`: their files, what is kept of them, and what is not read."""

import gzip
import json
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data import reading as data
from recipes.data.parted_data import PartedData
from recipes.data.parts import indices_in, part_of
from recipes.instruction_tuning import sources

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


@pytest.mark.parametrize(
    ("name", "split", "is_refused"),
    [
        ("mine.csv", "train", True),
        ("mine_{split}.csv", "train", True),
        ("mine.csv", "other.csv", False),
        ("nyu-mll/glue", "validation", False),
        ("nyu-mll/glue", None, False),
    ],
)
def test_no_part_is_read_from_where_training_is(name: str, split: str | None, is_refused: bool) -> None:
    for settings in ({"validation_split": split}, {"test_split": split}):
        refused = pytest.raises(MisconfigurationException, match="is where the training data come from")
        with refused if is_refused else nullcontext():
            PartedData(name, **settings).division.refuse_wrong_splits("fit")


def test_a_packaged_data_set_has_its_own_splits_alone() -> None:
    with pytest.raises(MisconfigurationException, match=r"sentiment' has no split 'test'"):
        PartedData("packaged:sentiment", test_split="test").division.refuse_wrong_splits("test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "?", r"a.xlsx' is neither a folder nor a file that ends in .json, .jsonl, .parquet, .csv, .tsv"),
        ("empty.csv", "", r"empty.csv': there is no such file, or it is empty"),
        ("other.csv", None, r"other.csv': there is no such file, or it is empty"),
        ("wide.csv", "text,label\na film, a good one,1\nb,0\n", r"more values than .* put texts with commas in"),
        ("late.csv", "n\n" + "1\n" * 10_000 + "one\n", r"can't be read: .*Failed to parse string: 'one'"),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(MisconfigurationException, match=message):
        data.read_table(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    "name", ["mine.csv", "mine.csv.gz", "mine.tsv", "open_clip.csv", "[1]/mine.csv", "folder/a.csv"]
)
def test_words_for_nothing_and_other_separators_stay(tmp_path: Path, name: str) -> None:
    """open_clip's tables are separated by tabs, whatever their extension; brackets are a pattern in globbing."""
    separator = "\t" if "tsv" in name or "open_clip" in name else ","
    rows = [("question", "answer"), ("None", "abc"), ("What is null?", "NA"), ("n/a", "")]
    text = "".join(separator.join(row) + "\n" for row in rows).encode("utf-8-sig")  # Excel's files begin like this
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    for source in [file, file.parent] if file.parent.name == "folder" else [file]:
        found = data.read_table(str(source), "train").to_list()
        assert [tuple(row.values()) for row in found] == [("None", "abc"), ("What is null?", "NA"), ("n/a", None)]


def noted(row: dict[str, Any], calls: str) -> dict[str, Any]:
    with Path(calls).open("a") as file:
        file.write("x")
    return {"more": row["question"] + "!"}


def test_an_update_of_the_code_converts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` identifies a function of a module only by its name."""
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
        sources.load_chats(file, "train")
    assert "columns read: answer, question; left out: source" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sources.load_chats(file, "train", columns={"question": "question", "answer": "answer"})
    # Whoever renames some columns may think that the others stay.
    assert "columns read: answer, question; left out: source" in caplog.text


# -- folders


@pytest.mark.parametrize(
    ("names", "number", "said", "unread"),
    [
        (["a.jsonl", "b.jsonl"], 6, "train is a.jsonl, b.jsonl", None),
        (["train.jsonl", "more.jsonl"], 3, "train is train.jsonl", "more.jsonl"),
        (["a.jsonl", "b.csv"], 3, "train is a.jsonl", "b.csv"),
        (["train/a.jsonl", "train/b.jsonl", "test/c.jsonl"], 6, "test is c.jsonl", None),
        (["one.csv", "two.csv", "README.md"], 3, "train is one.csv", None),  # its card names the file
    ],
)
def test_the_files_that_are_read_of_a_folder_are_named(
    tmp_path: Path, names: list[str], number: int, said: str, unread: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        save_table(tmp_path / "mine" / name)
    warned = pytest.warns(UserWarning, match=f"{unread} are not read, being in no split") if unread else nullcontext()
    with caplog.at_level(logging.INFO), warned:
        assert len(data.read_table(str(tmp_path / "mine"), "train")) == number
    assert any(message.endswith(said) for message in caplog.messages)


def test_texts_with_commas_outside_of_quotes_are_refused(tmp_path: Path) -> None:
    """pandas would take a row's first value as its index, and the second one as the text."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\n" + "good, and long,0\nbad, and short,1\n" * 3)
    for source in (folder, folder / "train.csv"):
        with pytest.raises(MisconfigurationException, match="put texts with commas into quotes"):
            data.read_table(str(source), "train")


def save_table(file: Path) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    if file.suffix == ".md":
        file.write_text("---\nconfigs:\n- config_name: default\n  data_files: one.csv\n---\n")
    elif file.suffix == ".csv":
        file.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer'][:8]}\n" for row in ROWS))
    else:
        written(file)


# -- parts


def divided(keys: list[str], **shares: float) -> dict[str, list[str]]:
    return {
        part: [keys[index] for index in indices_in(part, keys, shares, "mine", "texts")] for part in ("train", *shares)
    }


@pytest.mark.parametrize("number", [2, 3, 20])
def test_few_rows_leave_one_for_each_part_that_is_wanted(number: int) -> None:
    keys = [f"text {n // 2}" for n in range(2 * number)]
    with pytest.warns(
        UserWarning, match=f"none of {2 * number} rows falls into validation's share of 1e-06: it takes the nearest"
    ):
        parts = divided(keys, validation=1e-6, test=0.0)
    assert len(parts["train"]) == 2 * number - 2
    assert parts["test"] == []
    assert len(parts["validation"]) == 2
    # The example that would be the first there with more rows or a larger share.
    for share in np.arange(0.0001, 1, 0.0001):
        nearest = {key for key in keys if part_of(key, {"validation": share}) == "validation"}
        if nearest:
            break
    assert nearest == set(parts["validation"])


def test_rows_that_fall_into_a_part_stay_there() -> None:
    keys, shares = [f"text {n}" for n in range(200)], {"validation": 0.1, "test": 0.1}
    for part, there in divided(keys, **shares).items():
        assert there == [key for key in keys if part_of(key, shares) == part]
    with pytest.warns(UserWarning, match="none of 3 rows falls into"):
        assert [len(there) for there in divided(["a", "b", "c"], validation=1e-6, test=1e-6).values()] == [1, 1, 1]
    with pytest.warns(UserWarning, match="none of 2"), pytest.raises(MisconfigurationException, match="left for test"):
        divided(["a", "b"], validation=1e-6, test=1e-6)
