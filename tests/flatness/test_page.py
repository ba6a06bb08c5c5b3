"""What docs/flatness.md says works: the snippets run, functions, measures and tests exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_flatlora import EFMLoRA, FlatnessMonitor, flatness

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "flatness.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_the_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "'expected_sharpness_error': tensor(" in run.stdout


@pytest.mark.filterwarnings("ignore")  # LightningCLI's, of its parser
def test_the_configuration_makes_the_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    settings = {"trainer.logger": False, "trainer.accelerator": "cpu", **yaml.safe_load(text)}
    made = LightningCLI(
        BoringModel, run=False, args=settings, save_config_callback=None, seed_everything_default=False
    ).trainer.callbacks
    ema, monitor = [callback for callback in made if isinstance(callback, EFMLoRA | FlatnessMonitor)]
    assert isinstance(ema, EFMLoRA)
    assert (monitor.rho, monitor.every_n_steps, monitor.batches) == (0.5, 200, 4)


def test_the_table_names_what_exists_and_all_of_it() -> None:
    assert [row[0].strip("`") for row in ROWS if row[0]] == list(flatness.MEASURES)
    for row in ROWS:
        assert row[5].strip("`") in flatness.__all__, row
        file, test = row[7].strip("`").split("::")
        assert f"def {test}(" in (HERE / file).read_text(), row
