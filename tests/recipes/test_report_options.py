"""Every mistake of a command line is one line that says what to do, before a model is loaded."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import write_rows

from recipes.report.options import AdapterFolder
from recipes.report.run import main


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
        (["--rho", "0.1", "0"], r"--rho and --sigma must be finite and > 0.* rho=\[0.1, 0.0\]"),
        (["--points", "4"], "--points 3 or more and odd: got .* points=4"),
        (["--samples", "1"], "--samples and --max_length 2 or more.* samples=1"),
        (["--batch_size", "0"], "--batch_size 1 or more.* batch_size=0"),
        (["--adapter", "adapter", "x/adapter"], "labels must differ"),
        (["--adapter", "ia3"], "ia3 can't be measured: its adapter_config.json must say .* got IA3, None and None"),
        (["--adapter", "mine"], "mine can't be measured: .* got None, None and None"),
        (["--output", "adapter"], "--output adapter holds adapter_config.json: give another folder"),
    ],
)
def test_mistakes(given: list[str], says: str, adapter: Path, data: Path) -> None:
    folder_with(Path("ia3"), {"peft_type": "IA3"})
    Path("mine").mkdir()
    with pytest.raises(MisconfigurationException, match=says):
        main(["--adapter", str(adapter), "--data", str(data), *given])
    assert not list(Path().glob("**/report.md"))
