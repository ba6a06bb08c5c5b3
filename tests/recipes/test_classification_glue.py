"""GLUE's tasks on a tiny random RoBERTa: the shipped configurations, on files with the Hub's schema."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_sets import GLUE, prepared
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import quick, trained
from safetensors.torch import load_file

from recipes.classification import data as recipe_data
from recipes.command_line.cli import RecipeCLI

pytestmark = [
    pytest.mark.usefixtures("command_line", "own_datasets"),
    pytest.mark.filterwarnings("ignore:The variance of predictions or target is close to zero:UserWarning"),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets:UserWarning"),
]

PAIR = {"text": ["sentence1", "sentence2"]}
CONFIGS = Path(recipe_data.__file__).parent / "configs"
EFMLORA = ["--trainer.callbacks+=lightning_flatlora.EFMLoRA", "--trainer.callbacks.rho=0.05"]
METRICS = {
    "cola": {"val_matthews", "val_accuracy"},
    "mrpc": {"val_accuracy", "val_f1"},
    "qqp": {"val_accuracy", "val_f1"},
    "stsb": {"val_pearson", "val_spearman"},
}


def run(command: str, model: str, glue: str, task: str, *options: str) -> RecipeCLI:
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("base", "glue", f"glue/{task}")]
    given = [f"--model.model={model}", f"--data.dataset={glue}", "--data.batch_size=8"]
    given += ["--trainer.max_epochs=1"] if command == "fit" else []
    return quick(command, configs, *given, *options)


@pytest.mark.parametrize("task", GLUE)
def test_each_task_trains_and_keeps_the_best_by_its_own_metric(task: str, roberta: str, glue: str) -> None:
    cli = run("fit", roberta, glue, task)
    logged = cli.trainer.callback_metrics
    assert {name for name in logged if not name.startswith("train")} == METRICS.get(task, {"val_accuracy"}) | {
        "val_loss",
        "val_score",
    }
    assert cli.datamodule.classes == GLUE[task][1]
    assert len(cli.datamodule.parts["train"]) == 48
    saver = cli.trainer.checkpoint_callback
    assert saver.monitor == "val_score"
    assert Path(saver.best_model_path).is_file()
    assert saver.best_model_score == logged["val_score"]


def predictions(cli: RecipeCLI, part: str) -> tuple[list[float], list[float]]:
    """The model's prediction for each row by itself, and the labels."""
    cli.model.eval()
    predicted = []
    for ids in cli.datamodule.parts[part]["input_ids"]:
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        with torch.no_grad():
            logits = cli.model.logits(batch)[0]
        predicted.append(logits.item() if len(logits) == 1 else float(logits.argmax()))
    return predicted, cli.datamodule.parts[part]["labels"][:]


def test_a_regression_learns_and_is_measured_by_correlation(roberta: str, glue: str) -> None:
    options = ["--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=20", "--model.learning_rate=1e-2"]
    cli = run("fit", roberta, glue, "stsb", *options, *EFMLORA)
    predicted, labels = predictions(cli, "validation")
    expected = torch.corrcoef(torch.tensor([predicted, labels]))[0, 1]
    assert cli.trainer.callback_metrics["val_pearson"] == pytest.approx(expected.item(), abs=1e-4)
    squared = (torch.tensor(predicted) - torch.tensor(labels)).square().mean()
    assert cli.trainer.callback_metrics["val_loss"] == pytest.approx(squared.item(), rel=1e-4)
    assert expected > 0.5


# -- starting from another run's adapter


@pytest.fixture(scope="module")
def mnli(roberta: str, glue: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an adapter trained on MNLI."""
    place = tmp_path_factory.mktemp("mnli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
        patch.chdir(place)
        run("fit", roberta, glue, "mnli", "--run_name=mnli")
    (config,) = place.rglob("mnli/version_0/checkpoints/last/adapter_config.json")
    return str(config.parent)


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_another_tasks_adapter_starts_a_run_with_a_new_head(task: str, mnli: str, roberta: str, glue: str) -> None:
    cold = trained(run("fit", roberta, glue, task, "--trainer.max_steps=0"))
    warm = trained(run("fit", roberta, glue, task, "--trainer.max_steps=0", f"--model.start_from={mnli}"))
    saved = load_file(f"{mnli}/adapter_model.safetensors")
    for name, weight in warm.items():
        if "lora_" in name:
            key = name.removeprefix("net.").replace(".default", "")
            assert torch.equal(weight, saved[key]), name
        else:
            assert torch.equal(weight, cold[name]), name
    assert any(weight.any() for name, weight in warm.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lora.lora_alpha=32"], r"other settings: set {.*'lora_alpha': 16, .*} in lora"),
        (["--model.lora.rank_pattern={query: 4}"], r"other settings: set {.*'rank_pattern': {}, .*} in lora"),
        (["--model.lora.target_modules=[query,key]"], "adapts other layers than lora"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    options: list[str], message: str, mnli: str, roberta: str, glue: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run("fit", roberta, glue, "rte", f"--model.start_from={mnli}", *options)


def test_only_a_fit_reads_the_folder_and_a_resumed_one_may_leave_it_out(mnli: str, roberta: str, glue: str) -> None:
    options = [f"--model.start_from={shutil.copytree(mnli, 'start')}", "--data.test_split=validation"]
    cli = run("fit", roberta, glue, "rte", *options)
    saver = cli.trainer.checkpoint_callback
    shutil.move("start", "elsewhere")
    checkpoint = f"--ckpt_path={saver.last_model_path}"
    run("test", roberta, glue, "rte", *options, checkpoint)
    resumed = run("fit", roberta, glue, "rte", options[1], checkpoint, "--trainer.max_epochs=2")
    assert resumed.trainer.current_epoch == 2


# -- what is refused


def test_hidden_labels_are_refused_when_they_are_evaluated(roberta: str, glue: str) -> None:
    settings = {"dataset": glue, "test_split": "test"}
    for own in ({"config_name": "sst2", "text": ["sentence"]}, {"config_name": "stsb", "regression": True, **PAIR}):
        assert prepared(roberta, **settings, **own).parts["train"]
        with pytest.raises(MisconfigurationException, match=r"split='test': .* has no label.* Nothing is left"):
            prepared(roberta, "test", **settings, **own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config_name": "sst3"}, "can't be read.*sst3.*not found"),
        ({"validation_split": "dev"}, "split='dev' can't be read.*dev"),
        ({"text": ["premise"]}, r"has the columns \['idx', 'label', 'sentence'\] but not \['premise'\]"),
        ({"regression": True, "label": "sentence"}, "'sentence' must hold numbers for a regression"),
        ({"regression": True, "shots": 4}, "shots needs classes"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, roberta: str, glue: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared(roberta, **{"dataset": glue, "config_name": "sst2", "text": ["sentence"], **settings})


@pytest.mark.parametrize(("task", "metric"), [("sst2", "pearson"), ("stsb", "f1")])
def test_metrics_of_the_other_kind_are_refused(task: str, metric: str, roberta: str, glue: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"metrics=\['{metric}'\] must be some of \['"):
        run("fit", roberta, glue, task, f"--model.metrics=[{metric}]")


# -- the data


def test_pairs_for_bert_say_where_the_second_text_begins(tmp_path: Path, jsonl: Any) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two"]
    transformers.BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained(tmp_path)
    path = jsonl([{"a": "one", "b": "two " * (1 + i % 2), "label": i % 2} for i in range(8)])
    shares = {"validation_share": 0.0, "test_share": 0.0}
    data = prepared(str(tmp_path), dataset=path, text=["a", "b"], **shares)
    rows = data.parts["train"]
    assert rows["token_type_ids"][0] == [0, 0, 0, 1, 1]
    batch = recipe_data._collate(rows[:2], 0)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


def test_csv_files_for_each_part(roberta: str, tmp_path: Path) -> None:
    for name, rows in {"train": ["good,yes", "bad,no"] * 6, "dev": ["okay,yes"], "test": ["great,no"] * 3}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["review,liked", *rows]))
    splits = {"validation_split": str(tmp_path / "dev.csv"), "test_split": str(tmp_path / "test.csv")}
    settings: dict[str, Any] = {"dataset": str(tmp_path / "train.csv"), "text": ["review"], "label": "liked", **splits}
    data = prepared(roberta, **settings)
    assert data.classes == ["no", "yes"]
    assert {part: rows["labels"][:] for part, rows in data.parts.items()} == {"train": [1, 0] * 6, "validation": [1]}
    assert prepared(roberta, "test", **settings).parts["test"]["labels"][:] == [0] * 3
    (tmp_path / "dev.csv").write_text("review,liked\nokay,perhaps")
    with pytest.raises(MisconfigurationException, match=r"'perhaps', which is not among the classes \['no', 'yes'\]"):
        prepared(roberta, **settings)


@pytest.mark.parametrize("missing", [None, -1])
def test_rows_without_a_label_are_left_out(missing: int | None, roberta: str, jsonl: Any) -> None:
    """-1 is not a class if the others are integers from 0 on; next to a single other label it is one."""
    path = jsonl([{"text": f"It was {i}", "label": (0, 1, missing)[i % 3]} for i in range(90)])
    with pytest.warns(UserWarning, match="30 of 90 rows can't be used: row 2 has no label"):
        data = prepared(roberta, dataset=path)
    assert data.classes == ["0", "1"]
    for part in data.parts.values():
        assert set(part["labels"]) == {0, 1}
    path = jsonl([{"text": f"It was {i}", "label": (1, -1)[i % 2]} for i in range(40)], "two.jsonl")
    assert prepared(roberta, dataset=path).classes == ["-1", "1"]


def test_shots_are_drawn_by_their_seed(roberta: str, jsonl: Any) -> None:
    path = jsonl([{"text": f"It was {i // 2}", "label": int(i % 10 < 2)} for i in range(200)])
    draws = []
    for seed in (13, 13, 21):
        data = prepared(roberta, dataset=path, shots=15, shots_seed=seed, test_share=0.0)
        train, validation = (data.parts[part] for part in ("train", "validation"))
        assert sorted(train["labels"]) == [0] * 15 + [1] * 15
        assert sorted(validation["labels"]) == [0] * 15 + [1] * 5  # all that is left: 20 texts, each twice
        drawn = {tuple(ids) for ids in [*train["input_ids"], *validation["input_ids"]]}
        assert len(drawn) == 50
        draws.append(train["input_ids"][:])
    assert draws[0] == draws[1] != draws[2]


def test_the_rows_of_a_test_are_the_same_in_all_runs(roberta: str, glue: str) -> None:
    settings = {"dataset": glue, "config_name": "sst2", "text": ["sentence"], "test_split": "validation"}
    few = []
    for seed in (1, 2):
        few.append(prepared(roberta, "test", test_rows=7, shots=4, shots_seed=seed, **settings).parts["test"])
    assert few[0]["input_ids"][:] == few[1]["input_ids"][:]
    assert len(few[0]) == 7
