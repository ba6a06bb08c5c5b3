"""How good answers are: exact match and VQA accuracy, as a whole and per type of question."""

import re
from collections import Counter

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric

from recipes.ranks import gathered

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_AGREEING = 3  # annotators who make an answer fully right


def normalised(answer: str) -> str:
    """An answer without case, punctuation and articles, numbers up to ten in digits.

    Example:
        >>> normalised("The two Cats.")
        '2 cats'
    """
    words = re.findall(r"\w+(?:[.']\w+)*", answer.casefold())
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def expected_answer(answers: list[str]) -> str:
    """The answer that most annotators gave, the first of them if several did.

    Example:
        >>> expected_answer(["red", "dark red", "Red", "dark red", "red."])
        'red'
    """
    votes = Counter(normalised(answer) for answer in answers)
    return max(answers, key=lambda answer: votes[normalised(answer)])


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """min(n / 3, 1), where n annotators gave the answer.

    Example:
        >>> vqa_accuracy("dog", ["dog", "a dog", "cat", "puppy"])
        0.6666666666666666
    """
    agreeing = sum(normalised(other) == normalised(answer) for other in answers)
    return min(agreeing / _AGREEING, 1.0)


class AnswerMetrics(nn.Module):
    """Metrics of one evaluation: loss per answer token, exact match, VQA accuracy, exact match per type.

    Attributes:
        compared: answers that the ranks have compared so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.exact_match = MeanMetric()
        self.vqa_accuracy = MeanMetric()
        self.per_type = nn.ModuleDict()
        self.compared = 0

    def update_loss(self, log_likelihood: Tensor, tokens: Tensor) -> None:
        """Take up the expected answers' log-likelihoods in nats and numbers of tokens, each (examples,)."""
        self.loss.update(-log_likelihood / tokens, tokens)

    def update_answers(self, given: list[str], answers: list[list[str]], types: list[str]) -> None:
        """Take up generated answers, what annotators answered, and the questions' types ("" for none)."""
        for answer, expected, kind in zip(given, answers, types, strict=True):
            is_right = float(normalised(answer) == normalised(expected_answer(expected)))
            self.exact_match.update(is_right)
            if len(expected) >= _AGREEING:
                self.vqa_accuracy.update(vqa_accuracy(answer, expected))
            if kind:
                self._of_type(kind).update(is_right)

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log those that some rank's data has updated, at the end of an evaluation; every rank has to call it."""
        self.compared = 0
        for kind in sorted(set().union(*gathered(list(self.per_type)))):
            self._of_type(kind)  # of other ranks too: they are reduced together
        named = {"loss": self.loss, "exact_match": self.exact_match, "vqa_accuracy": self.vqa_accuracy}
        named |= {f"exact_match_{kind}": self._of_type(kind) for kind in sorted(self.per_type)}
        for name, metric in named.items():
            if module.trainer.strategy.reduce_boolean_decision(metric.update_called, all=False):
                metric.update(0.0, weight=0.0)  # changes nothing; torchmetrics warns of ranks without an update
                module.log(f"{stage}_{name}", metric, prog_bar=metric in (self.loss, self.exact_match))

    def _of_type(self, kind: str) -> MeanMetric:
        name = re.sub(r"\W+", "_", kind.casefold())
        if name not in self.per_type:
            self.per_type[name] = MeanMetric().to(self.loss.device)
        metric = self.per_type[name]
        assert isinstance(metric, MeanMetric)
        return metric
