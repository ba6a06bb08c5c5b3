"""When two texts are equal, in any script."""

import pytest

from recipes.data.text_metrics import is_same


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The answer is 5.", "the answer is 5", True),
        ("v1.2.3", "v1.2.3.", True),
        ("$5", "5", True),
        ("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE", True),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}", True),
        ("\N{MINUS SIGN}3", "-3", True),
        ("3-4", "3 - 4", True),
        ("-3", "3", False),
        ("1.5", "1 5", False),
        ("\u092a\u093f\u0924\u093e", "\u092a\u0940\u0924\u093e", False),  # Hindi; they differ only in a vowel sign
        ("\u0e17\u0e35\u0e48", "\u0e17\u0e39\u0e48", False),  # Thai; likewise
        (".5", "5", False),
        ("-.5", "-5", False),
        ("snake_case", "snake case", False),
        ("\u2600\ufe0f", "\u2764\ufe0f", False),  # a sun and a heart, both displayed as emoji
        ("Yes \u2714\ufe0f", "Yes", True),
        ("", "+", False),
        ("-", "+", False),
        ("+", "+", True),
    ],
)
def test_texts_that_are_the_same(answer: str, right: str, expected: bool) -> None:
    assert is_same(answer, right) is expected
