"""The examples that a seed draws, their noisy labels and their order, and how a run is scored."""

import math
from itertools import chain

import pytest
import torch
from evidence_runs import SETTINGS, made_up, tiny_encoder

from recipes.evidence.data import batch_places, most_similar_classes, training_examples, with_noise
from recipes.evidence.scores import fitted_temperature, linear_probe, scores
from recipes.language import texts
from recipes.language.texts import Example

pytestmark = pytest.mark.usefixtures("evidence")


def test_noise_replaces_the_share_by_other_classes_evenly() -> None:
    examples = [Example(str(place), place % 5, "") for place in range(5000)]
    noisy = with_noise(examples, 0.4, classes=5, seed=3)
    shifts = [(new.label - old.label) % 5 for new, old in zip(noisy, examples, strict=True)]
    assert shifts.count(0) == 3000
    for shift in (1, 2, 3, 4):
        assert shifts.count(shift) == pytest.approx(500, abs=100)
    assert [example.text for example in noisy] == [example.text for example in examples]
    assert noisy == with_noise(examples, 0.4, classes=5, seed=3) != with_noise(examples, 0.4, classes=5, seed=4)
    assert with_noise(examples, 0.0, classes=5, seed=3) == examples


def test_noise_of_similar_classes_takes_the_nearest_mean() -> None:
    # Two texts of each class, whose tokens have the mean of their class: 0, 1 and 5 along one axis.
    positions = {"a": 0.0, "b": 1.0, "c": 5.0}
    examples = []
    for label, name in enumerate("abc"):
        examples += [Example(name, label, "")] * 2

    def states(text: str) -> torch.Tensor:
        return torch.tensor([[positions[text] - 1, 0.0], [positions[text] + 1, 0.0]])

    similar = most_similar_classes(examples, 3, states)
    assert similar == [1, 0, 1]
    noisy = with_noise(examples, 1.0, 3, seed=0, similar=similar)
    assert [example.label for example in noisy] == [1, 1, 0, 0, 1, 1]
    some = with_noise(examples, 0.5, 3, seed=0, similar=similar)
    drawn = with_noise(examples, 0.5, 3, seed=0)
    # The same examples are hit, whichever class takes the place of theirs.
    hit = [old.label != new.label for old, new in zip(examples, some, strict=True)]
    assert hit == [old.label != new.label for old, new in zip(examples, drawn, strict=True)]
    assert sum(hit) == 3


def test_noise_of_a_workload_reaches_its_training_examples_alone() -> None:
    states = tiny_encoder().states
    clean = training_examples(SETTINGS, 0, states)
    noisy = training_examples({**SETTINGS, "noise": 0.5}, 0, states)
    assert sum(old.label != new.label for old, new in zip(clean, noisy, strict=True)) == 6
    noisy = training_examples({**SETTINGS, "noise": 1.0, "noise_to": "most_similar"}, 0, states)
    similar = most_similar_classes(clean, 3, states)
    assert [example.label for example in noisy] == [similar[example.label] for example in clean]
    true = {example.text: example.label for example in made_up()}
    assert all(true[example.text] == example.label for example in texts.parts("tiny")["validation"])


def test_batches_pass_over_all_examples_and_a_longer_run_begins_alike() -> None:
    places = batch_places(examples=10, batch_size=3, steps=7, seed=0)
    assert [len(batch) for batch in places] == [3] * 7
    epoch = set(chain.from_iterable(places[:3]))
    assert len(epoch) == 9
    assert places == batch_places(10, 3, 14, seed=0)[:7] != batch_places(10, 3, 7, seed=1)
    with pytest.raises(ValueError, match="fewer than a batch of 11"):
        batch_places(examples=10, batch_size=11, steps=1, seed=0)


# -- loss, accuracy and calibration by hand, the temperature that undoes a scaling, and the linear probe


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
