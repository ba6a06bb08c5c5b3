"""Studies: which setting is chosen, and where a run goes on. The rest is tested with the programs that do it."""

import math
import os
from pathlib import Path

import pytest

from recipes.studies.choice import best
from recipes.studies.process import resuming

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


def test_a_run_goes_on_from_its_newest_last_checkpoint(tmp_path: Path) -> None:
    """By time within a long epoch, or of an epoch's end."""
    assert resuming(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(("last_by_time", "last", "epoch=9")):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        path.touch()
        os.utime(path, (0, 1000 - age))
    assert resuming(tmp_path) == [f"--ckpt_path={tmp_path / 'checkpoints' / 'last_by_time.ckpt'}"]
