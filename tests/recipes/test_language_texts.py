"""Packaged texts with classes: split without leaks, balanced, and drawn by a seed."""

from collections import Counter
from itertools import chain

import pytest

from recipes.offline import texts


@pytest.mark.parametrize("name", texts.TASKS)
def test_no_film_or_question_is_in_two_parts(name: str) -> None:
    parts = texts.parts(name)
    keys = []
    for part in texts.PARTS:
        keys.append({example.key for example in parts[part]})
    train, validation, test = keys
    assert not train & validation
    assert not train & test
    assert not validation & test
    every = [texts.normalized(example.text) for example in chain.from_iterable(parts.values())]
    assert len(set(every)) == len(every)
    # The rarest of all subjects has 77 questions; the smaller one of a pair has about 400.
    least = {"all_subjects": (198, 702)}.get(name, (110, 300) if "_" in name else (300, 1000))
    assert len(parts["validation"]) >= least[0]
    assert len(parts["test"]) >= least[1]
    for part in texts.PARTS:
        counts = Counter(example.label for example in parts[part])
        assert len(counts) == len(texts.TASKS[name].classes)
        assert len(set(counts.values())) == 1  # so that chance is 1 / classes


def test_shots_are_as_many_of_each_class_as_there_are() -> None:
    drawn = texts.shots("all_subjects", 32, seed=0)
    counts = Counter(texts.TASKS["all_subjects"].classes[example.label] for example in drawn)
    assert len(counts) == 18
    assert counts["Skin"] == 27  # as many as the training part has
    assert {count for subject, count in counts.items() if subject != "Skin"} == {32}
    assert len(set(drawn)) == len(drawn)
    parts = texts.parts("all_subjects")
    held_out = {example.key for example in [*parts["validation"], *parts["test"]]}
    assert not held_out & {example.key for example in drawn}
    assert set(texts.shots("all_subjects", 16, seed=0)) < set(drawn)
    assert drawn == texts.shots("all_subjects", 32, seed=0) != texts.shots("all_subjects", 32, seed=1)


def test_several_reviews_of_a_film_are_together() -> None:
    counts = Counter(example.key for example in texts.parts("sentiment")["test"])
    assert max(counts.values()) > 1  # if keys never repeated, the test would show nothing
