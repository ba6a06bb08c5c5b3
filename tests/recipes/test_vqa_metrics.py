"""How answers to questions about images are judged, compared with the VQA challenges' rules written out."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from recipe_runs import trainer
from typing_extensions import override

from recipes.language.evaluation import Means
from recipes.vqa.choices import chosen_letter, letter_by_lmms_eval
from recipes.vqa.metrics import is_right, normalized_answer, scores, vqa_accuracy

STATES = ("Texas", "Louisiana", "New York")


def accuracy_by_the_letter(answer: str, answers: Sequence[str]) -> float:
    """The rule word for word: each person's answer is set aside in turn, and compared with the others."""
    scores = []
    for aside in range(len(answers)):
        others = [other for place, other in enumerate(answers) if place != aside]
        matching = [other for other in others if other == answer]
        scores.append(min(1.0, len(matching) / 3))
    return sum(scores) / len(scores)


def test_the_accuracy_is_the_mean_over_people_set_aside() -> None:
    for people, agreeing in product((4, 5, 10), range(11)):
        answers = (["dog"] * agreeing + ["cat", "fox"] * 10)[:people]
        assert vqa_accuracy("dog", answers) == pytest.approx(accuracy_by_the_letter("dog", answers)), answers
    # Three people are too few.
    assert "vqa_accuracy" not in scores("dog", ["dog"] * 3, "", [])


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("Yes.", "yes"),
        ("The  red\ncar", "red car"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),  # a pronoun, not a contraction
        ("lets", "lets"),
        ("somebodyd", "somebody'd"),
        ("women's", "women's"),
        ("hadnt've", "hadn't've"),
        ("hadn'tve", "hadn't've"),
        ("'dont'", "'dont'"),  # in quotation marks it is not a contraction
        ("shed", "shed"),
        ("twas the 'ow'sat", "'twas 'ow's'at"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("well-known", "well known"),
        ("well - known", "well known"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("5.", "5"),
        ("what?!", "what"),
        ("", ""),
        ("A", "a"),  # the whole answer, so not an article
    ],
)
def test_texts_are_compared_as_in_the_challenges(answer: str, compared: str) -> None:
    assert normalized_answer(answer) == compared


SPELLINGS = {
    "A": ("The answer is A", "A. Louisiana", "Texas"),  # the letter counts, as in lmms-eval
    "B": (
        *("B", "b", "B.", "(B)", "(b).", " B\n", "**B**", "[B]", "'B'", "B)", "B:"),
        *("B. Louisiana", "(B) Louisiana", "b) louisiana", "B: it is in the south", "**B.** so"),
        *("The answer is B", "The answer is B.", "answer: (B)", "The correct option is B because"),
        *("Louisiana", "louisiana.", "The answer is Louisiana.", "Answer: **Louisiana**"),
    ),
    "C": ("New York",),
    None: (
        *("", " ", ".", "?", "D", "D. Ohio", "Ohio", "A boat", "a.m.", "The answer is a boat", "Bananas", "AB"),
        *("The answer is A. No, the answer is B.", "Texas or Louisiana", "answer"),
    ),
}


@pytest.mark.parametrize("named", SPELLINGS)
def test_the_option_that_an_answer_names(named: str | None) -> None:
    for answer in SPELLINGS[named]:
        assert chosen_letter(answer, STATES) == named, answer
        assert is_right(answer, ["B"], list(STATES)) == (named == "B"), answer


def test_two_options_of_one_text_are_told_apart_by_letters_alone() -> None:
    assert chosen_letter("Texas", ["Texas", "texas"]) is None
    assert chosen_letter("B", ["Texas", "texas"]) == "B"


def test_the_letter_that_lmms_eval_reads() -> None:
    for answer in ("B. Louisiana", "B.", " B\n", "b"):
        assert letter_by_lmms_eval(answer) == "B", answer
    for answer in ("", "The answer is B.", "b. Louisiana", "(B)", "Louisiana", "é", "É. so", "1"):
        assert letter_by_lmms_eval(answer) is None, answer


def test_both_ways_to_read_a_choice_are_measured() -> None:
    found = [scores(answer, ["B"], "", list(STATES)) for answer in ("B", "The answer is B.", "A", "")]
    assert [each["exact_match"] for each in found] == [1, 1, 0, 0]
    assert [each["lmms_eval_match"] for each in found] == [1, 0, 0, 0]
    assert scores("B", ["B"], "", []) == {"exact_match": 1}


class Judged(BoringModel):
    """Each batch asks one kind of question."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = Means()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metrics[f"kind_{batch_idx}"].update(batch_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self.metrics.log(self, "val")


def test_a_kind_of_question_may_come_after_the_sanity_check(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=3, num_sanity_val_steps=1)
    fit.fit(Judged())
    found = {name: value.item() for name, value in fit.callback_metrics.items() if "kind" in name}
    assert found == {"val_kind_0": 0, "val_kind_1": 1, "val_kind_2": 2}


def test_no_answer_is_never_right() -> None:
    assert not is_right("", ["A"], ["one", "two"])
    assert not is_right("", ["A"], [])
    assert not is_right("?", ["!"], [])
    assert vqa_accuracy("", ["the"] * 10) == 0.0
