"""Multiple-choice questions: their options as letters, and the letter that a generated answer names."""

import re
import string
from collections.abc import Sequence

_OPENS, _CLOSES = r"[(\[*\"']*", r"[)\]*\"']*"
# The answer is only a letter: "B", "b.", "(B)", "**B**".
_ALONE = re.compile(rf"{_OPENS}([a-z]){_CLOSES}[.:,)]?{_CLOSES}", re.IGNORECASE)
# It begins with a letter set apart by punctuation: "B. Louisiana", "(B) Louisiana", "b: it lies in the south".
_FIRST = re.compile(r"(?:[(\[*]+([a-z])[.:,]?[)\]*]+[.:,)]?|([a-z])[.:)])(?=\s)", re.IGNORECASE)
# It announces the letter: "The answer is B.", "Answer: (B)", "option B because". A capital, since "the answer is a
# boat" is a text.
_NAMED = re.compile(
    rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*{_OPENS}([A-Z])"
    r"(?=\s*$|\s*[)\].:,;*\"']|\s+(?:because|since|as)\b)"
)
_ANNOUNCED = re.compile(r"^(?:the\s+)?(?:correct\s+|right\s+)?answer(?:\s+is\s*:?|\s*:)\s*", re.IGNORECASE)


def letter_by_lmms_eval(answer: str) -> str | None:
    """Return the letter that lmms-eval's task scienceqa reads in an answer; None if it reads none.

    It takes a single letter, or a capital at the beginning with a full stop after it, whatever comes then. Its releases
    differ: some take a single small letter, as here, and then miss the second form; others take only single capitals.

    Args:
        answer: generated answer.

    Example:
        >>> [letter_by_lmms_eval(answer) for answer in ("B. Louisiana", "b", "The answer is B.", "")]
        ['B', 'B', None, None]
    """
    text = answer.strip()
    if len(text) == 1 and text.upper() in string.ascii_uppercase:
        return text.upper()
    return text[0] if len(text) > 1 and text[0] in string.ascii_uppercase and text[1] == "." else None


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer names; None if it names none, or several.

    Besides those that :func:`letter_by_lmms_eval` takes, the other usual forms count: a letter in brackets, a letter
    that the answer announces, and an option's own text.

    Args:
        answer: generated answer.
        choices: texts of the options.

    Example:
        >>> [chosen_letter(answer, ["Texas", "Louisiana"]) for answer in ("B. Louisiana", "The answer is A.", "b", "")]
        ['B', 'A', 'B', None]
    """
    text = answer.strip()
    allowed = string.ascii_uppercase[: len(choices)]
    alone, first = _ALONE.fullmatch(text), _FIRST.match(text)
    if alone is not None:
        named = {alone[1].upper()}
    elif first is not None:
        named = {(first[1] or first[2]).upper()}
    else:
        named = set(_NAMED.findall(text)) or _letters_of_text(text, choices)
    return named.pop() if len(named) == 1 and named <= set(allowed) else None


def _letters_of_text(text: str, choices: Sequence[str]) -> set[str]:
    """Return the letters of the options with this text."""
    said = _plain(_ANNOUNCED.sub("", text))
    return {string.ascii_uppercase[number] for number, choice in enumerate(choices) if said and _plain(choice) == said}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")
