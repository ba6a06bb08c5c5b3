"""Text classification on two processes, with a head and with prompts, against one process."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_sets import save_glue, save_roberta
from launch import Results, launch
from recipe_runs import run

from recipes.classification import data as recipe_data

CONFIGS = Path(recipe_data.__file__).parent / "configs"
MODES = {"head": ("glue", "mnli"), "prompt": ("prompt", "sst2")}
STRATEGIES = ("ddp", "fsdp2", "fsdp1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def common(place: Path) -> dict[str, list[str]]:
    """Arguments of the runs of each mode."""
    model, glue = save_roberta(place / "roberta"), save_glue(place / "glue")
    arguments = {}
    for mode, (folder, task) in MODES.items():
        arguments[mode] = [
            f"--config={CONFIGS / folder}.yaml",
            f"--config={CONFIGS / folder / task}.yaml",
            f"--model.init_args.model={model}",
            f"--data.init_args.dataset={glue}",
            "--trainer.precision=32-true",
            "--trainer.max_epochs=2",
            "--trainer.max_steps=-1",
            "--trainer.val_check_interval=1.0",
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.log_every_n_steps=1",
            "--data.init_args.batch_size=4",
        ]
    arguments["prompt"].append("--data.init_args.shots=12")
    return arguments


@pytest.fixture(scope="module")
def results(place: Path, common: dict[str, list[str]]) -> Results:
    runs = {}
    for mode, strategy in product(MODES, STRATEGIES):
        name = f"{mode}-{strategy}"
        arguments: dict[str, Any] = {"command": "fit", "method": "efmlora", "strategy": strategy}
        arguments |= {"recipe": "classification", "options": common[mode]}
        runs[name] = ("recipe_runs:run", {"folder": str(place / name), **arguments})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, runs)


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_that_accumulates_their_batches(
    mode: str, results: Results, common: dict[str, list[str]], tmp_path: Path
) -> None:
    options = [*common[mode], "--trainer.accumulate_grad_batches=2"]
    expected = run("fit", str(tmp_path), "efmlora", "one", options, recipe="classification")
    for strategy in STRATEGIES:
        for rank in results[f"{mode}-{strategy}"]:
            assert rank["steps"] == expected["steps"], strategy
            for layer, weight in expected["weights"].items():
                torch.testing.assert_close(rank["weights"][layer], weight, rtol=1e-4, atol=1e-6)
            for metric in ("val_loss", "val_score"):
                assert rank["logged"][metric] == pytest.approx(expected["logged"][metric], rel=1e-5), strategy
