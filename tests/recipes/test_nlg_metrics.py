"""Scores of texts, compared with those of e2e-metrics and with values computed by hand.

The expected values are those of github.com/tuetschek/e2e-metrics (its metrics/pymteval.py, and the captioning scores
that it runs in Java) for these texts and references.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from recipes.nlg import metrics
from recipes.nlg.metrics import METRICS, WrittenTexts, bleu, nist, score

TEXTS = [
    "The Mill is a family-friendly pub near Café Rouge. It's cheap!",
    "Strada serves Italian food for £20-25, and it has a rating of 3 out of 5.",
    "In the city centre, Green Man is a pub.",
]
REFERENCES = [
    ["The Mill is a pub near Café Rouge; families are welcome.", "Near Café Rouge there's a cheap pub, The Mill."],
    ["For £20-25 Strada has Italian food. Customers rate it 3 out of 5."],
    ["Green Man is a pub in the city centre.", "The pub Green Man is in the city centre.", "Green Man is in town."],
]
E2E_METRICS = {"bleu": 42.727454, "nist": 4.220469, "meteor": 43.822188, "rouge_l": 60.246594, "cider": 4.075409}


def test_bleu_and_nist_are_those_of_e2e_metrics() -> None:
    assert bleu(TEXTS, REFERENCES) == pytest.approx(E2E_METRICS["bleu"], abs=1e-4)
    assert nist(TEXTS, REFERENCES) == pytest.approx(E2E_METRICS["nist"], abs=1e-4)


def test_the_captioning_scores_are_those_of_e2e_metrics() -> None:
    pytest.importorskip("pycocoevalcap", reason="the extra nlg is not installed")
    if not metrics.finds_java():
        pytest.skip("there is no Java")
    scores, missing = score(TEXTS, REFERENCES, METRICS)
    assert not missing
    assert tuple(scores) == METRICS
    for name, value in E2E_METRICS.items():
        assert scores[name] == pytest.approx(value, abs=1e-3), name


def test_nist_by_hand() -> None:
    """Two references of three tokens: "the" occurs twice among the six tokens, each other word once or twice."""
    text, references = "the cat sat", [["the cat sat", "the dog sat"]]
    one = math.log2(6 / 2) + math.log2(6 / 1) + math.log2(6 / 2)  # the, cat, sat
    two = math.log2(2 / 1) + math.log2(1 / 1)  # the cat, cat sat
    three = math.log2(1 / 1)
    assert nist([text], references) == pytest.approx(one / 3 + two / 2 + three)
    short = nist(["the cat"], references)
    penalty = math.exp(math.log(0.5) * (math.log(2 / 3) / math.log(1.5)) ** 2)
    assert penalty == pytest.approx(0.5)
    assert short == pytest.approx(0.5 * ((math.log2(3) + math.log2(6)) / 2 + 1))


def test_strange_texts_have_scores() -> None:
    assert nist(["", "x"], [["a"], ["b"]]) == 0
    assert bleu(["", "x"], [["a", "b c"], ["b"]]) == 0
    assert bleu(["A b C d e"], [["a B c D e"]]) == pytest.approx(100)


def test_what_is_missing_is_named_and_the_rest_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "finds_java", lambda: False)
    scores, missing = score(TEXTS, REFERENCES, METRICS)
    assert list(scores) == ["bleu", "nist"]
    assert set(missing) == {"meteor", "rouge_l", "cider"}
    assert all("install" in reason for reason in missing.values())
    written = WrittenTexts("test", ["bleu", "cider"])
    batch: dict[str, Any] = {"number": [1, 0], "meaning": ["b\tc", "a"], "references": [["x y"], ["w", "z\nz"]]}
    written.add(batch, ["", 'say "w"'])
    (tmp_path / "test_texts.tsv").write_text("somebody's own")
    with pytest.warns(UserWarning, match=r"test_cider is missing: .*install"):
        assert set(written.finish(tmp_path)) == {"bleu"}
    assert (tmp_path / "test_texts.tsv").read_text() == '"mr"\t"output"\n"a"\t"say ""w"""\n"b c"\t""\n'
    assert (tmp_path / "test_references.tsv").read_text() == '"mr"\t"reference"\n"a"\t"w"\n"a"\t"z z"\n"b c"\t"x y"\n'
    assert (tmp_path / "test_texts-1.tsv").read_text() == "somebody's own"
    assert written.finish(tmp_path) == {}
