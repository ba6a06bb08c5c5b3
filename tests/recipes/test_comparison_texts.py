"""The comparison's texts: split without leaks, balanced, drawn by a seed, and free of what gives the class away."""

from collections import Counter

import pytest

pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from recipes.comparison import texts


@pytest.mark.parametrize("name", texts.TASKS)
def test_no_film_mail_or_question_is_in_two_parts(name: str) -> None:
    parts = texts.parts(name)
    keys = {part: {example.key for example in parts[part]} for part in texts.PARTS}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    every = [texts.normalised(example.text) for part in texts.PARTS for example in parts[part]]
    assert len(set(every)) == len(every)
    assert len(parts["validation"]) >= 300
    assert len(parts["test"]) >= 1000
    for part in texts.PARTS:
        counts = Counter(example.label for example in parts[part])
        assert len(counts) == len(texts.TASKS[name].classes)
        assert len(set(counts.values())) == 1  # so that chance is 1 / classes


def test_several_reviews_of_a_film_are_together() -> None:
    counts = Counter(example.key for example in texts.parts("sentiment")["test"])
    assert max(counts.values()) > 1  # keys that never repeat would show nothing


def test_a_seed_draws_its_own_training_examples() -> None:
    first, again, other = (texts.few_shots("sentiment", 16, seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first) == 16
    assert set(first) != set(other)
    assert set(first) | set(other) <= set(texts.parts("sentiment")["train"])


def test_a_mail_is_read_without_what_tells_where_it_was_caught() -> None:
    headers = "From: a@b.c\nX-Spam: yes\nSubject: hello\nContent-Type: text/plain; charset="
    assert texts.mail_body(headers + "utf-8\n\nDear\n friend") == "Dear friend"
    assert texts.mail_body(headers + "utf-8\nContent-Transfer-Encoding: base64\n\nRGVhciBmcmllbmQ=") == "Dear friend"
    assert "Spam" not in texts.mail_body(headers + "nonsense\n\nDear friend")
    assert texts.mail_body("Content-Type: image/png\n\nabc") == ""
