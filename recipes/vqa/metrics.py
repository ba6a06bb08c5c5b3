"""The quality of answers: exact match and VQA accuracy, over all questions and for each type of question."""

import re
from collections import Counter
from itertools import product

from recipes.vqa.choices import chosen_letter, letter_by_lmms_eval

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",  # not "shed", which is a word
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",  # not "lets" and "shes", as in the script
    "'re": "there they what why you",
}
_WHOLE = ("ma'am", "o'clock", "'twas", "'ow's'at", "y'all", "y'all'll", "y'all'd've")
_AGREEING = 3  # people whose agreement makes an answer fully right
_PEOPLE = 4  # the fewest answers of which three are left when one is set aside


def _contractions() -> dict[str, str]:
    """Return each contraction's full form, by its spellings without some of its apostrophes."""
    words = list(_WHOLE)
    for ending, stems in _CONTRACTED.items():
        words += [stem + ending for stem in stems.split()]
    found = {}
    for word in words:
        pieces = word.split("'")
        for apostrophes in product(("", "'"), repeat=len(pieces) - 1):
            spelled = pieces[0]
            for apostrophe, piece in zip(apostrophes, pieces[1:], strict=True):
                spelled += apostrophe + piece
            found[spelled] = word
    return found


_APOSTROPHES = _contractions()


def normalized_answer(answer: str) -> str:
    """Return an answer in the form in which the VQA challenges' script compares it.

    It is in lower case, without punctuation and articles, with numbers up to ten in digits and contractions with their
    apostrophes. A punctuation mark between letters separates words, unless there are others next to a space. Unlike in
    that script, an answer of articles only stays as it is, since "A" would otherwise equal an empty answer; and a
    contraction of three words gets its apostrophes even if all of them are missing ("wouldntve").

    Args:
        answer: answer of a person or of a model.

    Example:
        >>> normalized_answer("The two Cats, dont know.")
        "2 cats don't know"
        >>> normalized_answer("A")
        'a'
    """
    text = " ".join(answer.split())
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_APOSTROPHES.get(word, word) for word in kept)


def _without_punctuation(text: str) -> str:
    has_thousands = re.search(r"\d,\d", text) is not None
    changed = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if is_beside_space or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", changed)  # but not the point of a decimal number


def expected_answer(answers: list[str]) -> str:
    """Return the answer that most annotators gave; among equals the first.

    Example:
        >>> expected_answer(["red", "dark red", "Red", "dark red", "red."])
        'red'
    """
    votes = Counter(normalized_answer(answer) for answer in answers)
    return max(answers, key=lambda answer: votes[normalized_answer(answer)])


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """Return the VQA challenges' accuracy: each person is set aside in turn, and the mean taken of min(n / 3, 1).

    n is how many of the other people gave the answer. With ten people 1, 2, 3 and 4 equal answers count .3, .6, .9
    and 1.

    Args:
        answer: generated answer.
        answers: answers of at least four people; of fewer, three can't be left.

    Example:
        >>> [round(vqa_accuracy("dog", ["dog"] * n + ["cat"] * (10 - n)), 3) for n in range(5)]
        [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    text = normalized_answer(answer)
    agrees = [text != "" and normalized_answer(other) == text for other in answers]
    agreeing = sum(agrees)
    shares = [min((agreeing - aside) / _AGREEING, 1.0) for aside in agrees]
    return sum(shares) / len(shares)


def is_right(answer: str, expected: list[str], choices: list[str]) -> bool:
    """Return whether an answer is the expected one or, with choices, names the expected option; an empty one is wrong.

    Example:
        >>> is_right("B. Louisiana", ["B"], ["Texas", "Louisiana"]), is_right("", ["A"], ["Texas", "Louisiana"])
        (True, False)
    """
    if choices:
        return chosen_letter(answer, choices) == expected_answer(expected)
    text = normalized_answer(answer)
    return text != "" and text == normalized_answer(expected_answer(expected))


def scores(answer: str, expected: list[str], kind: str, choices: list[str]) -> dict[str, float]:
    """Return a generated answer's score by each metric that its question has.

    Args:
        answer: generated answer.
        expected: answers of one or several people.
        kind: type of the question, "" for none.
        choices: options of the question, none for a free answer.

    Example:
        >>> scores("red", ["red"], "What colour?", [])
        {'exact_match': 1.0, 'exact_match_what_colour_': 1.0}
    """
    right = float(is_right(answer, expected, choices))
    found = {"exact_match": right}
    if choices:
        found["lmms_eval_match"] = float(letter_by_lmms_eval(answer) == expected_answer(expected))
    if len(expected) >= _PEOPLE:
        found["vqa_accuracy"] = vqa_accuracy(answer, expected)
    if kind:
        name = re.sub(r"\W+", "_", kind.casefold())  # a metric's name must not hold a dot
        found[f"exact_match_{name}"] = right
    return found
