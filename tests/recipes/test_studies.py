"""Studies: which setting is chosen. What is planned, shared and resumed is tested with the programs that do it."""

import math

import pytest

from recipes.studies.choice import best

GOOD, EQUAL, WORSE = [(0.9, -3.0), (0.5, -3.0)], [(0.7, -2.0), (0.7, -2.0)], [(0.6, -0.1), (0.6, -0.1)]
DIVERGED = [(0.9, 0.0), (math.nan, 0.0)]


@pytest.mark.parametrize(
    ("trials", "place"),
    [
        ([GOOD, EQUAL, WORSE], 1),  # equal means: the second number decides
        ([WORSE, GOOD], 1),
        ([EQUAL, EQUAL], 0),
        ([DIVERGED, WORSE], 1),
        ([WORSE, DIVERGED], 0),
        ([[(0.7, math.nan)], [(0.7, -9.0)]], 1),  # no number is never better than one, wherever it stands
        ([[(0.7, -9.0)], [(0.7, math.nan)]], 0),
        ([[(-math.inf,), (-0.5,)], [(-2.0,), (-2.0,)]], 1),
    ],
)
def test_the_best_mean_is_chosen(trials: list[list[tuple[float, ...]]], place: int) -> None:
    assert best(trials) == place
