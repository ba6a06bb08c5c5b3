"""How good answers are: exact match and VQA accuracy, over all questions and for each type of question."""

import re
from collections import Counter
from itertools import product

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric

from recipes.language.evaluation import log_updated
from recipes.shared.ranks import gathered
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
_AGREEING = 3  # people who make an answer fully right
_TYPE = "type_"  # how the metrics of the questions' types are kept
_PEOPLE = 4  # with at least so many answers, three are left when one is set aside


def _contractions() -> dict[str, str]:
    """From a contraction that lacks some of its apostrophes to the whole."""
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
    """An answer as the VQA challenges' script compares it.

    Lower case; without punctuation and articles; numbers up to ten in digits; contractions with their apostrophes. A
    mark of punctuation between letters separates words, unless there are others beside a space. Unlike in that script,
    an answer of articles alone stays as it is: else "A" would be equal to no answer at all. And a contraction of three
    words gets its apostrophes even where all of them are missing ("wouldntve").

    Args:
        answer: of a person or of a model.

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
    """The answer that most annotators gave, the first of them if several did.

    Example:
        >>> expected_answer(["red", "dark red", "Red", "dark red", "red."])
        'red'
    """
    votes = Counter(normalized_answer(answer) for answer in answers)
    return max(answers, key=lambda answer: votes[normalized_answer(answer)])


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """The VQA challenges' accuracy: each person is set aside in turn, and the mean taken of min(n / 3, 1).

    n is how many of the other people gave the answer. With ten people 1, 2, 3 and 4 equal answers count .3, .6, .9
    and 1.

    Args:
        answer: as generated.
        answers: of four people or more; of fewer, three can't be left.

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
    """Whether an answer is the expected one, or names the expected option where there are choices; none is wrong.

    Example:
        >>> is_right("B. Louisiana", ["B"], ["Texas", "Louisiana"]), is_right("", ["A"], ["Texas", "Louisiana"])
        (True, False)
    """
    if choices:
        return chosen_letter(answer, choices) == expected_answer(expected)
    text = normalized_answer(answer)
    return text != "" and text == normalized_answer(expected_answer(expected))


class AnswerMetrics(nn.Module):
    """Metrics of one evaluation: loss per answer token, exact match, for choices also lmms-eval's, VQA accuracy, exact
    match per type.

    Attributes:
        compared: answers that the ranks have compared so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.exact_match = MeanMetric()
        self.lmms_eval_match = MeanMetric()
        self.vqa_accuracy = MeanMetric()
        self.per_type = nn.ModuleDict()
        self.compared = 0

    def update_loss(self, log_likelihood: Tensor, tokens: Tensor) -> None:
        """Take up the expected answers' log-likelihoods in nats and numbers of tokens, each (examples,)."""
        self.loss.update(-log_likelihood / tokens, tokens)

    def update_answers(
        self, predictions: list[str], answers: list[list[str]], types: list[str], choices: list[list[str]]
    ) -> None:
        """Take up generated answers.

        Args:
            predictions: by the model.
            answers: of one or several people to each question.
            types: of the questions, "" for none.
            choices: of each question the options, none if it is answered freely.
        """
        for answer, expected, kind, options in zip(predictions, answers, types, choices, strict=True):
            right = float(is_right(answer, expected, options))
            self.exact_match.update(right)
            if options:
                named = letter_by_lmms_eval(answer)
                self.lmms_eval_match.update(float(named == expected_answer(expected)))
            if len(expected) >= _PEOPLE:
                self.vqa_accuracy.update(vqa_accuracy(answer, expected))
            if kind:
                self._of_type(kind).update(right)

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log those that some rank's data has updated, at the end of an evaluation; every rank has to call it."""
        self.compared = 0
        for key in sorted(set().union(*gathered(list(self.per_type)))):
            self._kept(key)  # of other ranks too: they are reduced together
        names = ("loss", "exact_match", "lmms_eval_match", "vqa_accuracy")
        named: dict[str, MeanMetric] = {name: getattr(self, name) for name in names}
        for key in sorted(self.per_type):
            named[f"exact_match_{key.removeprefix(_TYPE)}"] = self._kept(key)
        log_updated(module, stage, named, shown=("loss", "exact_match"))

    def _of_type(self, kind: str) -> MeanMetric:
        # A submodule's name must not hold a dot, nor be that of a method, such as "train".
        return self._kept(_TYPE + re.sub(r"\W+", "_", kind.casefold()))

    def _kept(self, key: str) -> MeanMetric:
        if key not in self.per_type:
            # A type shows up in the middle of an evaluation, when the other metrics have long been moved.
            self.per_type[key] = MeanMetric().to(self.loss.device)
        metric = self.per_type[key]
        assert isinstance(metric, MeanMetric)
        return metric
