"""Every mistake of a command line is one line that says what to do, before a model is loaded."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import write_rows

from recipes.report.options import AdapterFolder, parse


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return folder_with(tmp_path / "adapter", {"peft_type": "LORA", "task_type": "CAUSAL_LM"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", [{"text": "a"}])


def folder_with(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_labels_are_given_or_the_folders_names(tmp_path: Path) -> None:
    with_equals = folder_with(tmp_path / "epoch=2-step=414", {})
    assert AdapterFolder.parse(str(with_equals)).label == "epoch=2-step=414"
    assert AdapterFolder.parse(f"mine={with_equals}") == AdapterFolder("mine", with_equals)
    assert AdapterFolder.parse(f"{tmp_path}/no=such").path == tmp_path / "no=such"


def test_the_defaults_and_how_far_curves_go(adapter: Path, data: Path) -> None:
    given = ["--adapter", str(adapter), "--data", str(data)]
    assert parse(given).reach == pytest.approx(2 * max(parse(given).rho))
    assert parse([*given, "--rho", "1", "4"]).reach == 8
    assert parse([*given, "--radius", "3"]).reach == 3
    assert parse([*given, "--no-surface"]).surface is False


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rho", "0"], "--rho must be a finite number > 0, got 0.0"),
        (["--rho", "0.1", "nan"], "--rho must be a finite number > 0, got nan"),
        (["--radius", "-1"], "--radius must be a finite number > 0, got -1.0"),
        (["--sigma", "inf"], "--sigma must be a finite number > 0, got inf"),
        (["--points", "4"], "--points must be odd, so that one is the adapter itself, and 3 or more, got 4"),
        (["--directions", "1"], "--directions must be 2 or more, got 1"),
        (["--samples", "1"], "--samples must be 2 or more, got 1"),
        (["--examples", "0"], "--examples must be 1 or more, got 0"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--max_length", "1"], "--max_length must be 2 or more, got 1"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--device", "nonsense"], "--device nonsense can't be used here"),
        (["--device", "meta"], "--device meta can't be used here"),
    ],
)
def test_numbers_out_of_range(given: list[str], says: str, adapter: Path, data: Path) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        parse(["--adapter", str(adapter), "--data", str(data), *given])
    assert str(raised.value).startswith(says)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        parse(["--adapter", str(tmp_path / "none"), "--data", str(tmp_path / "none.csv"), "--points", "2"])
    assert [line.split()[0] for line in str(raised.value).split("; ")] == ["--adapter", "--data", "--points"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "is of type IA3, which has no factors A and B: only LoRA adapters can be measured"),
        ({}, "is of type None"),
        ([1], "is not a JSON object"),
    ],
)
def test_what_is_no_lora(config: object, says: str, tmp_path: Path, data: Path) -> None:
    folder = folder_with(tmp_path / "other", config)
    with pytest.raises(MisconfigurationException, match=says):
        parse(["--adapter", str(folder), "--data", str(data)])


def test_a_folder_of_several_adapters_says_which(tmp_path: Path, data: Path) -> None:
    folder_with(tmp_path / "last" / "mine", {"peft_type": "LORA"})
    with pytest.raises(MisconfigurationException, match=r"holds no adapter_config.json: take .*last/mine"):
        parse(["--adapter", str(tmp_path / "last"), "--data", str(data)])
    with pytest.raises(MisconfigurationException, match=r"holds no adapter_config.json: not peft's folder"):
        parse(["--adapter", str(tmp_path), "--data", str(data)])


def test_equal_labels_are_refused(adapter: Path, data: Path) -> None:
    with pytest.raises(MisconfigurationException, match="labels must differ, got adapter, adapter: write LABEL=FOLDER"):
        parse(["--adapter", str(adapter), str(adapter), "--data", str(data)])


def test_nothing_is_written_into_an_adapter(adapter: Path, data: Path) -> None:
    for output in (adapter, adapter / "report"):
        with pytest.raises(MisconfigurationException, match="lies in the adapter's folder"):
            parse(["--adapter", str(adapter), "--data", str(data), "--output", str(output)])


def test_a_report_that_can_not_be_written_is_told_before_anything_is_computed(
    adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--adapter", str(adapter), "--data", str(data)]
    for output in (data, data / "report"):
        with pytest.raises(
            MisconfigurationException, match=rf"--output {output} can't be written: {data} is not a folder"
        ):
            parse([*given, "--output", str(output)])
    assert parse([*given, "--output", str(tmp_path / "new" / "report")])
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(
        MisconfigurationException, match=rf"can't be written: {tmp_path} is not a folder that can be written to"
    ):
        parse([*given, "--output", str(tmp_path / "new" / "report")])


@pytest.mark.parametrize("name", ["report.md", "curves.png", "surface.png"])
def test_files_that_no_report_has_written_are_not_replaced(
    adapter: Path, data: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "notes"
    output.mkdir()
    (output / name).write_text("mine")
    given = ["--adapter", str(adapter), "--data", str(data), "--output", str(output)]
    with pytest.raises(
        MisconfigurationException, match=f"holds {name}, which no report has written: take another folder"
    ):
        parse(given)
    (output / "report.md").write_text("# Flatness of an earlier adapter\n")
    assert parse(given).output == output
