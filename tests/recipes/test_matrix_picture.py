"""The picture of the matrix in docs/results/matrix_picture.py."""

import math
import sys
from pathlib import Path

import pytest

from recipes.studies.statistics import Estimate

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_picture as picture


@pytest.mark.parametrize(
    ("found", "colour"),
    [
        (Estimate(-0.5, 0.1, 20), picture.BETTER),
        (Estimate(0.5, 0.1, 20), picture.WORSE),
        (Estimate(0.2, 0.1, 20), picture.EVEN),
        (Estimate(-0.05, 0.001, 20), picture.EVEN),
        (Estimate(-0.2, 0.1, 20), picture.EVEN),
        (Estimate(math.nan, math.nan, 20), picture.WORSE),
        (None, picture.NONE),
    ],
)
def test_the_interval_decides_the_colour(found: Estimate | None, colour: str) -> None:
    assert picture.colour_of(found, 0.1) == colour


def test_each_cell_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {("noise", "EFMLoRA"): Estimate(-0.5, 0.1, 20), ("noise", "FMLoRA"): None}
    monkeypatch.setattr(picture, "cells_of_a", lambda rows: cells)
    monkeypatch.setattr(picture, "cells_of_b", lambda rows: {("relearning", "FMLoRA"): Estimate(3.0, 2.0, 20)})
    monkeypatch.setattr(picture.matrix_b, "is_decided", bool)
    (alone,) = picture.draw([], []).axes
    assert [text.get_text() for text in alone.texts] == ["-0.50 ± 0.21", ""]
    above, below = picture.draw([], [{"stage": "final"}]).axes
    assert [text.get_text() for text in above.texts] == ["-0.50 ± 0.21", ""]
    assert [text.get_text() for text in below.texts] == ["+3.00 ± 4.19"]
    assert [label.get_text() for label in above.get_xticklabels()] == ["EFMLoRA", "FMLoRA"]
