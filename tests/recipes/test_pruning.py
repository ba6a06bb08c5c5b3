"""When a trial is ended early, however often its progress is checked."""

import math

import optuna
import pytest

from recipes.tune.pruning import Watch, is_worse_than_most


def test_a_value_is_compared_after_as_many_validations() -> None:
    others = [[3.0, 2.0, 1.0], [3.2, 2.2, 1.2], [9.0, 9.0, 9.0]]
    assert not is_worse_than_most([9.0], others, "min")  # a low rate starts slowly
    assert is_worse_than_most([9.0, 2.5], others, "min")
    assert not is_worse_than_most([9.0, 2.1], others, "min")
    assert is_worse_than_most([math.nan, math.nan], others, "min")
    assert not is_worse_than_most([9.0, 2.5], [[math.nan, math.nan]], "min")
    assert is_worse_than_most([0.1, 0.1], [[0.2, 0.5]], "max")
    assert not is_worse_than_most([], others, "min")
    assert not is_worse_than_most([1.0], [[]], "min")


@pytest.mark.parametrize("looks", [[1, 2, 3, 4], [4], [2, 4]])
def test_a_curve_ends_where_it_is_hopeless(looks: list[int]) -> None:
    validations = [{"val_loss": value} for value in (3.0, 2.5, 2.4, 0.1)]
    trial = optuna.create_study().ask()
    watch = Watch(trial, "val_loss", "min", [[3.0, 2.0, 1.0, 1.0], [3.0, 2.1, 1.1, 1.0]])
    ended = [watch.is_hopeless(validations[:number]) for number in looks if len(watch.curve) < 3]
    assert ended[-1]
    assert watch.curve == [3.0, 2.5, 2.4]
    assert trial.study.trials[0].intermediate_values == {0: 3.0, 1: 2.5, 2: 2.4}
