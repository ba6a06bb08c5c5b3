"""The arms beside P1 in docs/results/arms.py."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import Classifier, fit

from lightning_flatlora import EFMLoRA

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import arms


def test_turned_perturbations_point_down(tmp_path: Path) -> None:
    """After the first step, whose gradient is plain LoRA's in both."""
    found = []
    for callback in (EFMLoRA(0.5), arms.Turned(0.5)):
        fit(tmp_path, Classifier(), [callback], max_steps=1)
        found.append(callback.state_dict()["perturbation"]["E"])
    up, down = found
    assert up.keys() == down.keys()
    for name, E in up.items():
        assert E.any()
        assert torch.equal(down[name], -E)


@pytest.mark.parametrize("name", sorted(arms.ARMS))
def test_each_arm_has_options_of_its_strength(name: str) -> None:
    arm = arms.ARMS[name]
    given = [tuple(arm.options(strength, 0)) for strength in arm.strengths]
    assert len(set(given)) == len(given) == 4
