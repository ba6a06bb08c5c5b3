"""A model that gives no numbers is never right, though argmax would choose its first class."""

import math

import pytest
import torch

from recipes.clip_fewshot.evaluation import Evaluation
from recipes.language.evaluation import right_choices
from recipes.training.diverged import wrong_where_nan

NAN = math.nan


def test_an_evaluation_of_images_counts_it_as_wrong() -> None:
    evaluation = Evaluation(3)
    labels = torch.tensor([0, 2, 1])
    scores = torch.tensor([[NAN, NAN, NAN], [0.1, NAN, 0.8], [0.1, 0.8, 0.1]])
    evaluation.update(wrong_where_nan(scores, labels), labels)
    values, _ = evaluation.take()
    assert values["accuracy"] == pytest.approx(1 / 3)


def test_a_choice_between_options_counts_it_as_wrong() -> None:
    batch = {"options": [2, 2], "gold": torch.tensor([0, 3])}
    assert right_choices(torch.tensor([NAN, NAN, -2.0, -1.0]), batch) == [0.0, 1.0]
