"""When two texts are the same."""

import re


def normalized(text: str) -> str:
    """A text without case, punctuation and repeated spaces: what makes two questions the same.

    Example:
        >>> normalized("What  is a\\nCAT?")
        'what is a cat'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def is_same(answer: str, right: str) -> bool:
    """Whether two texts are equal except for case, punctuation and spaces; texts of punctuation alone must be equal.

    Example:
        >>> is_same("it is 7", "It is 7."), is_same("", "+"), is_same("-", "+")
        (True, False, False)
    """
    if normalized(right):
        return normalized(answer) == normalized(right)
    return answer.strip() == right.strip()
