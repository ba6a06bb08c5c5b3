"""The comparison end to end on shortened tasks: what it runs, keeps, never repeats, and shows."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from lightning_flatlora import ConstantRho, CosineRho
from recipes.clip import emoji
from recipes.clip_fewshot import emoji as few_shot_emoji
from recipes.comparison import __main__ as command
from recipes.comparison import emoji as emoji_task
from recipes.comparison.__main__ import main
from recipes.comparison.classification import TextTask
from recipes.comparison.commonsense import CommonsenseTask
from recipes.comparison.emoji import EmojiTask
from recipes.comparison.methods import ALL, METHODS
from recipes.comparison.plan import RESULTS, TUNING_SEEDS, Plan
from recipes.comparison.run import Row, Run, perform
from recipes.comparison.tasks import TASKS
from recipes.instruction_tuning import sources
from recipes.shared import methods
from recipes.shared.ledger import read
from recipes.studies.plan import Config

FLATNESS = {"sharpness_rho": 1.0, "noise": 0.5, "precision": "32-true"}
SETTINGS = {"examples": 16, "length": 16, "epochs": 1, "batch_size": 8, "validation": 20, "test": 20, **FLATNESS}
GRIDS = {"learning_rate": (1e-3, 1e-2), "full_learning_rate": (1e-4, 1e-3), "rho": (0.5, 2.0), "sam_rho": (0.01, 0.1)}


@pytest.fixture(scope="module")
def task() -> TextTask:
    return TextTask("sentiment", SETTINGS, GRIDS, "sentiment")


@pytest.fixture
def only_this(task: TextTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TASKS", {"sentiment": task})
    monkeypatch.setattr(command, "_WAIT", 0.01)


# -- methods


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].parameter in ("rho", "sigma", "alpha")])
def test_the_hyper_parameter_arrives_in_the_callback(name: str) -> None:
    settings = {"learning_rate": 1.0, ALL[name].parameter: 0.7, "seed": 3}
    (callback,) = methods.METHODS[name].callbacks(**settings)
    assert callback.rho in (ConstantRho(0.7), CosineRho(0.7, 0.0), CosineRho(0.0, 0.7))  # type: ignore[attr-defined]
    assert isinstance(callback.rho, ConstantRho) == (ALL[name].parameter == "rho")  # type: ignore[attr-defined]


def test_every_method_has_as_many_configurations_to_choose_from() -> None:
    for each in TASKS.values():
        assert {len(method.configurations(each.grids, 1.0)) for method in ALL.values()} == {4}, each.name


# -- the plan


class Fake:
    """Stands in for training: the second configuration of every method is the best."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, run: Run) -> Row:
        self.done.append(str(run))
        grid = ALL[run.method].grid
        assert isinstance(grid, str)
        return run.key() | {"accuracy": float(run.config[ALL[run.method].parameter] == GRIDS[grid][1]), "loss": 1.0}


def planned(folder: Path, task: TextTask) -> Plan:
    return Plan(folder, [task], ["efmlora", "full_sam"], [0, 1, 2])


def test_the_order_of_a_plan(tmp_path: Path, task: TextTask) -> None:
    fake, plan = Fake(), planned(tmp_path, task)
    plan.work(fake, lambda run: None)
    assert len(fake.done) == len(set(fake.done)) == 4 * 4 + 2 * 3  # of LoRA and full fine-tuning only the choice
    assert plan.done_and_total == (22, 22)
    rows = read(tmp_path / RESULTS)
    tests = [row for row in rows if row["part"] == "test"]
    assert {(row["method"], row["seed"]) for row in tests} == set(product(plan.methods, (0, 1, 2)))
    configs: dict[str, Config] = {row["method"]: row["config"] for row in tests}
    assert configs["efmlora"] == {"learning_rate": 1e-2, "rho": 2.0}
    assert configs["full_sam"] == {"learning_rate": 1e-3, "rho": 0.1}
    assert {row["seed"] for row in rows if row["part"] == "validation"} == set(TUNING_SEEDS)


# -- real runs


@pytest.mark.usefixtures("only_this")
def test_runs_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["run", "--methods", "lora", "efmlora", "--seeds", "0", "1", f"--folder={tmp_path}"]
    assert main(given) == 0
    rows = read(tmp_path / RESULTS)
    assert len(rows) == 4 + 2 + 4 + 2
    for row in rows:
        assert row["examples"] == 20
        assert row["accuracy"] == row["correct"] / 20
        assert all(math.isfinite(row[name]) for name in ("loss", "seconds_per_step", "processor_seconds_per_step"))
        assert ("sharpness" in row) == (row["part"] == "test")
    test = {(row["method"], row["seed"]): row for row in rows if row["part"] == "test"}
    assert test["lora", 0]["sharpness"] > 0
    assert test["lora", 0]["adapted_norm"] == test["efmlora", 1]["adapted_norm"] > 0
    assert len({row["train_loss"] for row in test.values()}) == 4  # seeds and methods do something of their own

    assert main(["plot", f"--folder={tmp_path}"]) == 0
    for name in ("gain", "sharpness", "tuning", "cost"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 400

    lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / RESULTS).write_text("".join(lines[:-1]) + lines[-1][:-20])  # the last line was cut off
    done: list[str] = []
    monkeypatch.setattr(command, "perform", lambda run: [done.append(str(run)), perform(run)][1])
    assert main(given) == 0
    assert len(done) == 1  # what is finished is not run again
    again = read(tmp_path / RESULTS)[-1]
    cost = {"seconds", "seconds_per_step", "processor_seconds_per_step", "peak_mib"}
    assert {k: v for k, v in again.items() if k not in cost} == {k: v for k, v in rows[-1].items() if k not in cost}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lora", "efmlora")])
def test_every_method_runs(task: TextTask, name: str) -> None:
    own = {"weight_decay": 0.1, "dropout": 0.1} if name == "lora_regularised" else {ALL[name].parameter: 0.05}
    row = perform(Run(task.name, name, {"learning_rate": 1e-3} | own, 0, "test", task))
    assert math.isfinite(row["loss"])
    full = methods.METHODS[name].full
    assert ("full_sharpness" in row) == full  # two measures that must not be mixed up
    assert ("sharpness" in row) != full


# -- the tasks of other models


@pytest.fixture
def questions(tiny: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> CommonsenseTask:
    """The first questions of CommonsenseQA by a random model."""
    load = sources.load
    monkeypatch.setattr(sources, "load", lambda *given, **named: load(*given, **named).select(range(160)))
    monkeypatch.setattr(CommonsenseTask, "model", tiny)
    return CommonsenseTask("commonsense", {"examples": 8, "epochs": 1, "batch_size": 4} | FLATNESS, GRIDS)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmojiTask:
    """Each sixtieth emoji by a model of two steps, in a cache of its own."""
    (tmp_path / "emoji").symlink_to(emoji.prepare().pairs.parent)
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(EmojiTask, "pretraining", {"steps": 2, "batch_size": 4})
    monkeypatch.setattr(emoji_task, "examples", lambda *given: few_shot_emoji.examples(*given)[::60])
    return EmojiTask("emoji", {"shots": 1, "steps_per_shot": 2, "epochs": 1, "batch_size": 32} | FLATNESS, GRIDS)


@pytest.mark.parametrize("name", ["questions", "pictures"])
def test_other_models_run_too(name: str, request: pytest.FixtureRequest) -> None:
    task = request.getfixturevalue(name)
    flat = perform(Run(task.name, "efmlora", {"learning_rate": 1e-3, "rho": 0.1}, 0, "test", task))
    assert flat["examples"] > 5
    for entry in ("loss", "train_loss", "sharpness", "expected_sharpness", "adapted_norm"):
        assert math.isfinite(flat[entry]), entry


def test_answers_are_judged_as_in_their_own_recipe(questions: CommonsenseTask) -> None:
    module: Any = questions.module({"learning_rate": 1e-3}, full=False)
    data = questions.data(seed=0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        limit_test_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    (expected,) = trainer.test(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        judged = [questions.judge(module, batch) for batch in questions.batches(trainer, "test")[:3]]
    correct, loss, terms = (float(sum(each)) for each in list(zip(*judged, strict=True))[:3])
    assert correct / 12 == pytest.approx(expected["test_accuracy"])
    assert loss / terms == pytest.approx(expected["test_loss"], rel=1e-3)  # of weights in bfloat16
    assert sum(len(batch["options"]) for batch in questions.batches(trainer, "train")) == 8
