"""Texts for meanings on two processes under DDP against one process: training, loss, written texts and scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Results, launch
from nlg_sets import save_e2e, save_gpt2
from recipe_runs import run

from recipes.shared.configs import RECIPES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def common(place: Path) -> list[str]:
    return [
        f"--config={RECIPES / 'nlg' / 'configs' / 'e2e.yaml'}",
        f"--model.init_args.model={save_gpt2(place / 'gpt2')}",
        "--model.init_args.max_new_tokens=6",
        "--model.init_args.metrics=[bleu,nist]",
        "--model.init_args.warmup_steps=2",
        "--model.init_args.lora.lora_dropout=0.0",  # each rank draws its own
        f"--data.init_args.dataset={save_e2e(place / 'e2e')}",
        "--data.init_args.batch_size=4",
        "--data.init_args.validation_texts=6",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=8",
        "--trainer.log_every_n_steps=1",
    ]


@pytest.fixture(scope="module")
def results(place: Path, common: list[str]) -> Results:
    arguments: dict[str, Any] = {"command": "fit", "method": "efmlora", "strategy": "ddp", "recipe": "nlg"}
    arguments["options"] = [option.replace("batches=8", "batches=4") for option in common]
    test = arguments | {"command": "test", "method": "lora"}
    runs = {
        "fit": ("recipe_runs:run", {"folder": str(place / "fit"), **arguments}),
        "test": ("recipe_runs:run", {"folder": str(place / "test"), **test}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, runs)


@pytest.mark.usefixtures("command_line", "own_datasets")
def test_two_processes_train_as_one_that_accumulates_their_batches(
    results: Results, common: list[str], tmp_path: Path
) -> None:
    options = [*common, "--trainer.accumulate_grad_batches=2"]
    expected = run("fit", str(tmp_path), "efmlora", "one", options, recipe="nlg")
    for rank in results["fit"]:
        assert rank["steps"] == expected["steps"] == 4
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-6)
        for name in ("val_loss", "val_bleu", "val_nist"):
            assert rank["logged"][name] == pytest.approx(expected["logged"][name], rel=1e-5)


@pytest.mark.usefixtures("command_line", "own_datasets")
def test_two_processes_write_the_texts_of_one(results: Results, common: list[str], place: Path, tmp_path: Path) -> None:
    expected = run("test", str(tmp_path), "lora", "one", common, recipe="nlg")
    assert {"test_loss", "test_bleu", "test_nist"} < set(expected["logged"])
    for rank in results["test"]:
        assert rank["logged"] == pytest.approx(expected["logged"], rel=1e-5)
    for name in ("test_texts.tsv", "test_references.tsv"):
        (together,), (alone,) = (folder.glob(f"runs/**/{name}") for folder in (place / "test", tmp_path))
        assert together.read_text() == alone.read_text()
        assert len(together.read_text().splitlines()) > 7
