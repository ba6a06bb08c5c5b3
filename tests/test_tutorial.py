"""The tutorial notebook of the site, run from its first cell to its last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

nbclient = pytest.importorskip("nbclient", reason="the tools that run notebooks are not installed")
nbformat = pytest.importorskip("nbformat", reason="the tools that run notebooks are not installed")

from helpers import same  # noqa: E402
from peft import load_peft_weights  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"

pytestmark = pytest.mark.timeout(1200)  # on a busy machine it takes twice as long

SHORTER = {
    "number=16, seed=0": "number=2, seed=0",
    'parts["validation"], parts["test"][:360]': 'parts["validation"][:18], parts["test"][:36]',
    "max_epochs=14,\n        check_val_every_n_epoch=14,": "max_epochs=2,\n        check_val_every_n_epoch=2,",
    "for rho in (0.0, 8.0, 32.0):": "for rho in (0.0, 32.0):",
    "every_n_steps=21, batches=2": "every_n_steps=3, batches=1",
    "questions.head(36)": "questions.head(8)",
    "--examples 36 --batch_size 18 --points 5 --directions 2 --samples 4": (
        "--examples 8 --batch_size 8 --points 3 --directions 2 --samples 2"
    ),
}
"""What decides how long the notebook runs, and values for the test."""


def shortened(source: str, found: set[str]) -> str:
    """A cell with the test's values; notes which ones were replaced."""
    for given, short in SHORTER.items():
        if given in source:
            source = source.replace(given, short)
            found.add(given)
    return source


def outputs(notebook: Any, kind: str) -> list[str]:
    """The outputs of a notebook's cells in one format."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if kind in output.get("data", {}):
                found.append(output["data"][kind])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes the place of the clone, so that the runs are written there."""
    return tmp_path_factory.mktemp("clone")


@pytest.fixture(scope="module")
def executed(folder: Path) -> Iterator[Any]:
    """The notebook with the outputs of this run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    found: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # otherwise a skipped cell would keep its stored outputs
            cell.source = shortened(cell.source, found)
    assert found == set(SHORTER)
    docs = folder / "docs"
    docs.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("OMP_NUM_THREADS", "1")
        client = nbclient.NotebookClient(
            notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(docs)}}
        )
        client.execute()
    return notebook


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_peft_weights(str(folder / "runs" / "tutorial" / run / "last"), device="cpu")


def test_it_runs_and_shows_what_its_page_shows(executed: Any, folder: Path) -> None:
    """The monitor's curve and the report's picture and table; rho zero and the monitor don't change LoRA's run."""
    assert len(outputs(executed, "image/png")) == 2
    (table,) = outputs(executed, "text/markdown")
    assert "| | unit | LoRA | EFMLoRA |" in " ".join(table.split())
    lora = weights(folder, "lora")
    assert same(lora, weights(folder, "rho_0_seed_0"))
    assert same(lora, weights(folder, "lora_monitored"))
    assert not same(lora, weights(folder, "rho_32_seed_0"))
    assert not same(lora, weights(folder, "rho_0_seed_1"))
    assert not same(lora, weights(folder, "dropout_seed_0"))


def test_the_page_shows_the_outputs_of_one_run_in_order() -> None:
    """The site is built without running the notebook, so the stored outputs must be complete."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs(stored, "image/png")) == 2
    assert len(outputs(stored, "text/markdown")) == 1
    for cell in cells:
        assert not any(output.output_type == "error" for output in cell.outputs)
