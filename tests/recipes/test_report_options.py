"""Every mistake of a command line is one line that says what to do, before a model is loaded."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import write_rows

from recipes.report.options import AdapterFolder, parse


@pytest.fixture(autouse=True)
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
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
        (["--rho", "0.1", "0"], r"--rho and --sigma must be finite and > 0, got \[0.1, 0.0\]"),
        (["--points", "4"], "--points must be odd, so that one is the adapter, got 4"),
        (["--samples", "1"], "--samples must be 2 or more, got 1"),
        (["--adapter", "ia3"], "is of type IA3: only LoRA adapters can be measured"),
        (["--adapter", "several"], "holds no adapter_config.json: take several/mine"),
        (["--adapter", "mine"], "holds no adapter_config.json: not peft's folder"),
        (["--output", "adapter"], "is in the adapter's folder"),
        (["--output", "adapter/report"], "is in the adapter's folder"),
        (["--output", "data.jsonl/report"], "data.jsonl/report can't be written: .*data.jsonl is"),
        (["--output", "mine"], "holds curves.png, which no report has written"),
        (["--adapter", "none"], "--adapter none is not a folder"),
    ],
)
def test_mistakes(given: list[str], says: str, adapter: Path, data: Path) -> None:
    folder_with(Path("ia3"), {"peft_type": "IA3"})
    folder_with(Path("several") / "mine", {"peft_type": "LORA"})
    Path("mine").mkdir()
    Path("mine/curves.png").write_text("mine")
    with pytest.raises(MisconfigurationException, match=says):
        parse(["--adapter", str(adapter), "--data", str(data), *given])


def test_an_earlier_report_is_replaced(adapter: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_text("an earlier one")
    (tmp_path / "report.md").write_text("# Flatness of an earlier adapter\n")
    given = ["--adapter", str(adapter), "--data", str(data)]
    assert parse([*given, "--output", str(tmp_path)]).output == tmp_path
    assert parse([*given, "--output", str(tmp_path / "new" / "report")])
