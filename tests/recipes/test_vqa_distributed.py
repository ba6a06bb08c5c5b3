"""The recipe on two processes under DDP, FSDP2 and FSDP1, from its YAML, against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launch import Results, launch
from peft import PeftModel
from recipe_runs import run
from vqa_models import COLOURS, draw, save_model

from recipes.clip.images import read_image
from recipes.vqa.conversation import QuestionEncoder
from recipes.vqa.metrics import normalized_answer
from recipes.vqa.model import DEFAULT_LORA
from recipes.vqa.module import VQA

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

STRATEGIES = ("ddp", "fsdp2", "fsdp1")
RUNS = ("ddp:efmlora", "ddp:fmlora_manual", "fsdp2:efmlora", "fsdp2:fmlora_manual", "fsdp1:efmlora")
SHARDED = [name for name in RUNS if not name.startswith("ddp")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return save_model("qwen2_5_vl", place / "model")


@pytest.fixture(scope="module")
def common(model: str, place: Path) -> list[str]:
    """Arguments of all runs; images of different sizes, five questions to predict."""
    rows, asked = draw(place, 28), [{"image": f"{i}.png", "question": f"is it {COLOURS[i % 3]}?"} for i in range(5)]
    module = VQA(model, DEFAULT_LORA, "float32", max_new_tokens=4)
    module.configure_model()
    module.eval()
    encoder = QuestionEncoder(module.processor)
    for row in rows[::2]:  # of which the model knows the answers
        prompt, image = encoder.prompt(row["question"]), read_image(place / row["image"])
        answer = module.answers(encoder([prompt], [image], padding_side="left"))[0]
        row["answer"] = answer if normalized_answer(answer) else row["answer"]
    for name, lines in (("data.jsonl", rows), ("asked.jsonl", asked)):
        (place / name).write_text("\n".join(json.dumps(row) for row in lines))
    return [
        f"--model.init_args.model={model}",
        "--model.init_args.dtype=float32",
        "--model.init_args.gradient_checkpointing=true",
        "--model.init_args.max_new_tokens=4",
        "--model.init_args.validation_answers=7",
        "--model.init_args.lora.lora_dropout=0",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        f"--data.init_args.dataset={place / 'data.jsonl'}",
        f"--data.init_args.questions={place / 'asked.jsonl'}",
        "--data.init_args.validation_share=0.3",
        "--data.init_args.test_share=0.3",
        "--data.init_args.test_split=null",
        "--data.init_args.batch_size=3",
    ]


EVERY_STEP = [
    "--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint",
    "--trainer.callbacks.init_args.every_n_train_steps=1",
    "--trainer.callbacks.init_args.save_top_k=-1",
    "--trainer.callbacks.init_args.filename={step}",
    "--model.init_args.lora.lora_dropout=0.2",
]


def cases(place: Path, common: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """All runs on two processes, in their order."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(name: str, command: str, method: str, strategy: str, options: list[str]) -> None:
        arguments = {"command": command, "recipe": "vqa", "method": method, "strategy": strategy}
        found[name] = ("recipe_runs:run", {"folder": str(place / name), "options": common + options, **arguments})

    for name in RUNS:
        strategy, method = name.split(":")
        add(name, "fit", method, strategy, [])
    for strategy in STRATEGIES:
        add(f"{strategy}:test", "test", "lora", strategy, [])
        add(f"{strategy}:predict", "predict", "lora", strategy, [])
    checkpoint = place / "fsdp2:whole" / "runs" / "vqa" / "efmlora" / "version_0" / "checkpoints" / "step=2.ckpt"
    add("fsdp2:whole", "fit", "efmlora", "fsdp2", EVERY_STEP)
    add("fsdp2:resumed", "fit", "efmlora", "fsdp2", [*EVERY_STEP, f"--ckpt_path={checkpoint}"])
    return found


@pytest.fixture(scope="module")
def results(place: Path, common: list[str]) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, cases(place, common))


@pytest.fixture
def alone(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same command in this process alone."""
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)  # and back

    def command(name: str, method: str, *options: str) -> Any:
        return run(name, str(tmp_path), method, "one", [*common, *options], recipe="vqa")

    return command


def test_two_processes_equal_one_that_accumulates_their_batches(results: Results, alone: Any) -> None:
    expected = alone("fit", "efmlora", "--trainer.accumulate_grad_batches=2")
    for rank in results["ddp:efmlora"]:
        assert rank["steps"] == expected["steps"] > 2
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-6)
        assert rank["logged"]["val_loss"] == pytest.approx(expected["logged"]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_runs_equal_ddp(name: str, results: Results) -> None:
    whole = results[f"ddp:{name.split(':')[1]}"][0]
    assert any(weight.abs().max() > 0 for key, weight in whole["weights"].items() if "lora_B" in key)
    for rank in results[name]:
        assert rank["steps"] == whole["steps"]
        for key, weight in whole["weights"].items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-5, atol=1e-7)
        for key in ("val_loss", "val_exact_match", "val_exact_match_colour"):
            assert rank["logged"][key] == pytest.approx(whole["logged"][key], rel=1e-6), key


def test_methods_differ(results: Results) -> None:
    one, other = results["ddp:efmlora"][0]["weights"], results["ddp:fmlora_manual"][0]["weights"]
    assert max((weight - other[name]).abs().max() for name, weight in one.items()) > 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_peft_loads_the_adapter(name: str, results: Results, place: Path, model: str) -> None:
    trained = results[name][0]["weights"]
    (folder,) = (place / name).glob("runs/vqa/*/version_0/checkpoints/last")
    base = transformers.AutoModelForImageTextToText.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, str(folder)).state_dict()
    for key, weight in trained.items():
        torch.testing.assert_close(loaded[key], weight)


def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(results: Results) -> None:
    for one, other in zip(results["fsdp2:whole"], results["fsdp2:resumed"], strict=True):
        assert one["steps"] == other["steps"] > 2
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
        assert one["logged"]["val_loss"] == other["logged"]["val_loss"]


def test_two_processes_measure_what_one_does(results: Results, alone: Any) -> None:
    expected = alone("test", "lora")["logged"]
    kinds = {"test_exact_match_colour", "test_exact_match_yes_no"}
    assert set(expected) == {"test_loss", "test_exact_match"} | kinds
    assert 0 < expected["test_exact_match"] < 1
    for strategy in STRATEGIES:
        for rank in results[f"{strategy}:test"]:
            assert rank["logged"] == pytest.approx(expected, rel=1e-5), strategy


def test_answers_are_those_of_one_process_in_the_order_of_the_questions(
    results: Results, alone: Any, place: Path, tmp_path: Path
) -> None:
    alone("predict", "lora")
    expected = answers(tmp_path)
    assert [row["image"] for row in expected] == [f"{i}.png" for i in range(5)]
    assert len({row["answer"] for row in expected}) > 1
    for strategy in STRATEGIES:
        assert results[f"{strategy}:predict"]
        assert answers(place / f"{strategy}:predict") == expected, strategy


def answers(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("runs/**/answers*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
