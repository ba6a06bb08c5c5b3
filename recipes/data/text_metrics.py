"""Comparison of texts."""

import re
import unicodedata

# A minus sign before a number, and the point of a decimal, change the number's value.
_OF_A_NUMBER = re.compile(r"(?<!\w)-(?=\.?\d)|(?<![^\W\d])\.(?=\d)")
_EMOJI_SELECTORS = re.compile("[\ufe00-\ufe0f]")  # which say how the sign before them is drawn
_MINUS_SIGN = "\N{MINUS SIGN}"


def normalized(text: str) -> str:
    """Return a text without case, punctuation and repeated spaces, so that equal questions are in one part of the data.

    It is coarse on purpose: it also drops accents that are separate characters. A text without any letter or digit does
    not change.

    Example:
        >>> normalized("What  is a\\nCAT?"), normalized("?!")
        ('what is a cat', '?!')
    """
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def is_same(answer: str, right: str) -> bool:
    """Return whether two texts have the same words in the same order, in any case; mere punctuation must be equal.

    Spaces and punctuation only separate words, so "e-mail" is not "email", nor "1,000" the number 1000. The marks that
    some scripts write as separate characters count, and so do a number's sign and decimal point.

    Example:
        >>> is_same("it is 7", "It is 7."), is_same("", "+"), is_same("-3", "3")
        (True, False, False)
    """
    if _words(right):
        return _words(answer) == _words(right)
    return answer.strip() == right.strip()


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text.casefold()).replace(_MINUS_SIGN, "-")
    text = _EMOJI_SELECTORS.sub("", text)
    of_numbers = {match.start() for match in _OF_A_NUMBER.finditer(text)}
    kept = []
    for index, character in enumerate(text):
        # Letters, marks and numbers; spaces, punctuation, symbols and controls stand between words.
        is_kept = unicodedata.category(character)[0] in "LMN" or character == "_" or index in of_numbers
        kept.append(character if is_kept else " ")
    return "".join(kept).split()
