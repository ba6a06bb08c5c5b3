"""A model that gives no numbers is never right, though argmax would choose its first class."""

import json
import math
from pathlib import Path

import pytest
import torch
from recipe_runs import quick

from recipes.clip_fewshot.evaluation import Evaluation
from recipes.language.evaluation import EvaluationMetrics
from recipes.shared.configs import config_arguments
from recipes.shared.diverged import wrong_where_nan

NAN = math.nan


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.filterwarnings("ignore:Encountered `nan` values:UserWarning")
def test_a_classifier_has_no_accuracy(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"The {'cat' if i % 4 else 'dog'} number {i}", "label": i % 4 > 0} for i in range(40)]
    Path("data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = [f"--model.model={tiny}", "--model.lora.target_modules=[q_proj,v_proj]", "--model.learning_rate=1e30"]
    options += ["--data.dataset=data.jsonl", "--data.batch_size=8", "--trainer.max_epochs=2"]
    configs = config_arguments("classification", "lora")
    cli = quick("fit", configs, *options, "--trainer.gradient_clip_val=null")
    metrics = cli.trainer.callback_metrics
    assert metrics["val_loss"].isnan()
    assert metrics["val_accuracy"] == metrics["val_score"] == 0


def test_an_evaluation_of_images_counts_it_as_wrong() -> None:
    evaluation = Evaluation(3)
    labels = torch.tensor([0, 2, 1])
    scores = torch.tensor([[NAN, NAN, NAN], [0.1, NAN, 0.8], [0.1, 0.8, 0.1]])
    evaluation.update(wrong_where_nan(scores, labels), labels)
    values, _ = evaluation.take()
    assert values["accuracy"] == pytest.approx(1 / 3)


def test_a_choice_between_options_counts_it_as_wrong() -> None:
    metrics = EvaluationMetrics()
    batch = {"options": [2, 2], "gold": torch.tensor([0, 3])}
    metrics.update_choices(torch.tensor([NAN, NAN, -2.0, -1.0]), batch)  # type: ignore[arg-type]
    assert metrics.accuracy.compute() == 0.5
