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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rho", "0.1", "nan"], "--rho must be a finite number > 0, got nan"),
        (["--points", "4"], "--points must be odd, so that one is the adapter itself, and 3 or more, got 4"),
        (["--samples", "1"], "--samples must be 2 or more, got 1"),
        (["--device", "nonsense"], "--device nonsense can't be used here"),
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


def test_nothing_is_written_into_an_adapter(adapter: Path, data: Path) -> None:
    for output in (adapter, adapter / "report"):
        with pytest.raises(MisconfigurationException, match="lies in the adapter's folder"):
            parse(["--adapter", str(adapter), "--data", str(data), "--output", str(output)])


def test_a_report_that_can_not_be_written_is_told_before_anything_is_computed(
    adapter: Path, data: Path, tmp_path: Path
) -> None:
    given = ["--adapter", str(adapter), "--data", str(data)]
    for output in (data, data / "report"):
        with pytest.raises(
            MisconfigurationException, match=rf"--output {output} can't be written: {data} is not a folder"
        ):
            parse([*given, "--output", str(output)])
    assert parse([*given, "--output", str(tmp_path / "new" / "report")])


def test_files_that_no_report_has_written_are_not_replaced(adapter: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_text("mine")
    given = ["--adapter", str(adapter), "--data", str(data), "--output", str(tmp_path)]
    with pytest.raises(MisconfigurationException, match=r"holds curves.png, which no report has written: take another"):
        parse(given)
    (tmp_path / "report.md").write_text("# Flatness of an earlier adapter\n")
    assert parse(given).output == tmp_path
