"""Kept adapters judged once more: rounded, at another scale, on texts with typos. Nothing is trained."""

import statistics
import time
from functools import cache
from pathlib import Path

from recipes.evidence.conditions import CONDITIONS, Condition, with_typos
from recipes.evidence.data import Batch, evaluation_batches
from recipes.evidence.encoder import CutEncoder
from recipes.evidence.kept import Kept, restored
from recipes.evidence.module import plain_logits
from recipes.evidence.run import encoder_of, held_out, surroundings
from recipes.evidence.scores import both_scores, fitted_temperature
from recipes.language import texts
from recipes.shared.ledger import Row

RESULTS = "robustness.jsonl"


def judge(kept: Kept, folder: Path) -> Row:
    """Scores under each condition.

    Returns:
        A JSON line: the run's key; ``conditions``, by name the :func:`~recipes.evidence.scores.both_scores` of the test
        part and the ``temperature``, fitted on the validation part without typos, with the same change of the weights,
        means over the tasks where there are several; ``seconds``, ``device``, ``commit`` and versions.
    """
    began = time.perf_counter()
    found = {name: _scores(kept, folder, condition) for name, condition in CONDITIONS.items()}
    return kept.key() | {"conditions": found, "seconds": time.perf_counter() - began, **surroundings()}


def _scores(kept: Kept, folder: Path, condition: Condition) -> dict[str, float]:
    """In float32, in which rounding is what the condition does and nothing else."""
    settings = kept.run.settings
    encoder = encoder_of(settings)
    of_tasks = []
    # Anew for each condition, because merging and rounding can't be undone exactly.
    for data, module in restored(kept, folder).items():
        if condition.change is not None:
            condition.change(module)
        validation = plain_logits(module, held_out(encoder, data, "validation", settings.get("validation")))
        test = plain_logits(module, _test_batches(encoder, data, condition.typos, settings.get("test")))
        temperature = fitted_temperature(*validation)
        of_tasks.append({**both_scores(*test, temperature), "temperature": temperature})
    means = {}
    for name in of_tasks[0]:
        means[name] = statistics.mean(scores[name] for scores in of_tasks)
    return means


@cache
def _test_batches(encoder: CutEncoder, data: str, typos: float, most: int | None = None) -> list[Batch]:
    """The lower layers compute the texts with typos once in a process, too."""
    if not typos:
        return held_out(encoder, data, "test", most)
    examples = texts.parts(data)["test"][:most]
    typed = [example._replace(text=with_typos(example.text, typos)) for example in examples]
    return evaluation_batches(typed, encoder.states)
