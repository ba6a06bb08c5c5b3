"""What all recipes have in common in one process, from their YAML: each method trains, and a stopped run resumes."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import load_peft_weights
from recipe_runs import run
from recipe_sets import NAMES, Recipe, prepared

from recipes.command_line.configs import methods_of
from recipes.training.random_state import RandomState

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

METRICS = {
    "classification": {"val_accuracy", "val_score"},
    "classification by prompts": {"val_accuracy", "val_score"},
    "clip_contrastive": {"val_image_to_text_recall@1", "val_text_to_image_recall@10"},
    "clip_fewshot": {"val_class_accuracy", "zero_shot_accuracy", "test_accuracy"},
    "instruction_tuning": {"val_perplexity", "val_exact_match"},
    "nlg": {"val_perplexity", "val_bleu", "val_nist"},
    "vqa": {"val_exact_match", "val_exact_match_colour"},
}
TESTED = {
    "classification": ["--data.init_args.test_split=validation_matched"],
    "clip_contrastive": ["--data.init_args.test_share=0.25"],
}
"""What a test needs beside."""
SHORT = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
SHORT += ["--model.init_args.learning_rate=0.02"]
WORKERS = {"clip_contrastive", "instruction_tuning"}
"""The recipes of which a run with worker processes is compared with one without."""

Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny: str, tokenizer: Any) -> dict[str, Recipe]:
    place = tmp_path_factory.mktemp("recipes")
    return {name: prepared(name, place / name, tiny, tokenizer) for name in NAMES}


@pytest.fixture
def start(recipes: dict[str, Recipe], tmp_path: Path) -> Start:
    """Run one of a recipe's commands by name, in this test's folder."""

    def start(name: str, method: str, *options: str, command: str = "fit") -> dict[str, Any]:
        recipe = recipes[name]
        given = ["--trainer.precision=32-true", *recipe.options, *recipe.ranks]
        return run(command, str(tmp_path), recipe.folder, method, "one", [*given, *options])

    return start


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all trained weights of two runs have the same bits."""
    assert one["weights"].keys() == other["weights"].keys()
    return all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_saves_an_adapter_and_is_tested(
    name: str, recipes: dict[str, Recipe], start: Start, tmp_path: Path
) -> None:
    fitted = {}
    for method in methods_of(recipes[name].folder):
        # Without an adapter there is no dropout.
        short = [*SHORT, *([] if method == "full" else ["--model.init_args.lora.lora_dropout=0"])]
        fitted[method] = start(name, method, *short)
        (folder,) = (tmp_path / "runs" / recipes[name].folder).glob("*/version_0")
        assert_complete(folder, name, fitted[method]["weights"], has_adapter=method != "full")
        if method == "efmlora":
            checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
            tested = start(name, method, *short, checkpoint, *TESTED.get(name, ()), command="test")
            assert same(fitted[method], tested)
            assert all(metric.startswith("test_") for metric in tested["logged"])
        shutil.rmtree(tmp_path / "runs")
    plain = start(name, "efmlora", *SHORT, "--model.init_args.lora.lora_dropout=0", "--trainer.callbacks.rho=0")
    assert same(fitted["lora"], plain)
    assert not any(same(fitted["lora"], fitted[method]) for method in ("efmlora", "fmlora"))


def assert_complete(folder: Path, name: str, weights: dict[str, torch.Tensor], has_adapter: bool) -> None:
    """A run has left its configuration, its logged values, and an adapter with the trained weights."""
    assert (folder / "config.yaml").is_file()
    assert {"train_loss"} | METRICS[name] <= set(logged(folder)[0])
    assert list(folder.glob("events.out.tfevents*")) or name.startswith("classification")
    if not has_adapter:
        return
    saved = load_peft_weights(str(folder / "checkpoints" / "last"), device="cpu")
    assert any(weight.any() for key, weight in saved.items() if "lora_B" in key)
    for key, weight in weights.items():
        plain = key.removeprefix("net.").replace(".default", "")
        assert "lora_" not in key or torch.equal(saved[plain], weight), key


# -- resuming after a stop


def saver(filename: str, **settings: Any) -> list[str]:
    """Arguments for another AdapterCheckpoint, which keeps everything that it saves."""
    settings |= {"save_top_k": -1, "filename": filename}
    given = [f"--trainer.callbacks.init_args.{name}={value}" for name, value in settings.items()]
    return ["--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint", *given]


def trained(start: Start, name: str, *options: str) -> dict[str, Any]:
    """A run of two epochs with four steps each, and two validations per epoch."""
    metric = "val_accuracy" if name == "clip_fewshot" else "val_loss"
    savers = [*saver("{step}", every_n_train_steps=1), *saver("val-{step}", monitor=metric, mode="max")]
    given = ["--trainer.max_epochs=2", "--trainer.max_steps=-1", "--trainer.limit_train_batches=4"]
    given += ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"]
    given += ["--model.init_args.lora.lora_dropout=0.2", "--trainer.callbacks.rho=0.5", *savers]
    return start(name, "efmlora", *given, *options)


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[str]:
    """The loss of each step."""
    return [row["train_loss"] for row in logged(folder) if row["train_loss"]]


PLACES = ("step=1", "val-step=2", "val-step=4", "step=7")
"""Within the first epoch, in its validation, at its end, and in the second one; each recipe resumes in one of them."""


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(start, name)
    assert whole["steps"] == 8
    (first,) = tmp_path.glob("runs/*/*/version_0")
    assert len(losses(first)) == 8
    place = PLACES[list(NAMES).index(name) % len(PLACES)]
    resumed = trained(start, name, f"--ckpt_path={first / 'checkpoints' / place}.ckpt")
    assert same(whole, resumed)
    assert losses(first.parent / "version_1") == losses(first)[int(place[-1]) :]
    assert evaluated(resumed) == evaluated(whole)
    if name in WORKERS:
        workers = "--data.init_args.num_workers=1"
        assert same(whole, trained(start, name, workers))
        saved = first.parent / "version_2" / "checkpoints" / "step=3.ckpt"
        assert same(whole, trained(start, name, workers, f"--ckpt_path={saved}"))
    if name == "instruction_tuning":  # here the random state matters
        monkeypatch.setattr(RandomState, "load_state_dict", lambda self, state: None)
        assert not same(whole, trained(start, name, f"--ckpt_path={first / 'checkpoints' / 'step=3.ckpt'}"))


def evaluated(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result["logged"].items() if name.startswith(("val_", "test_"))}
