"""Loss, accuracy and calibration by hand, the temperature that undoes a scaling, and the linear probe."""

import math

import pytest
import torch

from recipes.evidence.scores import fitted_temperature, linear_probe, scores


def test_scores_of_known_probabilities() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]).log()
    found = scores(logits, torch.tensor([0, 1, 1, 0]))
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-(math.log(0.8) + math.log(0.2) + math.log(0.7) + math.log(0.6)) / 4)
    assert found["brier"] == pytest.approx((0.08 + 1.28 + 0.18 + 0.32) / 4)
    # Bins: 0.8 (two, half of them right), 0.7 and 0.6 (right).
    assert found["ece"] == pytest.approx((2 * 0.3 + 0.3 + 0.4) / 4, abs=1e-6)


def test_the_temperature_undoes_a_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert fitted_temperature(5 * logits, labels) == pytest.approx(5, rel=0.1)


def test_the_probe_separates_what_can_be_separated() -> None:
    features, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    probe, penalty = linear_probe(features, labels, (features, labels), classes=3)
    assert torch.equal(probe(features).argmax(dim=1), labels)
    assert penalty == 1e-4
