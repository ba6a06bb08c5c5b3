"""Kept adapters judged once more: rounded, at another scale, on texts with typos. Nothing is trained."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from recipes.evidence.conditions import CONDITIONS, Condition, with_typos
from recipes.evidence.data import Batch, evaluation_batches
from recipes.evidence.encoder import CutEncoder
from recipes.evidence.module import ShotsClassifier, plain_logits
from recipes.evidence.plan import Plan, key_of_row
from recipes.evidence.run import Run, encoder_of, held_out, surroundings
from recipes.evidence.scores import both_scores, fitted_temperature
from recipes.evidence.weights import restore
from recipes.language import texts
from recipes.shared.ledger import Ledger, Row

RESULTS = "robustness.jsonl"
_WAIT = 2.0  # seconds, while other processes do all that is left


@dataclass(frozen=True)
class Kept:
    """A finished run whose weights are kept.

    Attributes:
        run: that trained them.
        weights: their file, relative to the ledger's folder.
    """

    run: Run
    weights: str

    def __str__(self) -> str:
        return str(self.run)

    def key(self) -> Row:
        """The run's own."""
        return self.run.key()


def ledger_of(folder: Path) -> Ledger:
    """The rows of this evaluation, one for each kept adapter."""
    return Ledger(folder / RESULTS, key_of_row)


def kept_runs(plan: Plan) -> list[Kept]:
    """All runs of the plan's workload, arms and seeds that name a file of weights."""
    found = []
    for row in plan.ledger.rows:
        is_wanted = row["workload"] == plan.workload and row["settings"] == plan.settings
        if is_wanted and row["arm"] in plan.arms and row["seed"] in plan.seeds and "weights" in row:
            found.append(Kept(Run(**key_of_row(row)), row["weights"]))
    return found


def work(runs: Iterable[Kept], folder: Path, report: Callable[[int], None]) -> None:
    """Judge all that no process has judged yet, until nothing is left.

    Args:
        runs: with their weights in the folder.
        folder: of the ledgers.
        report: is called with the number of finished runs, those of other processes included, when it has grown.
    """
    ledger, runs = ledger_of(folder), list(runs)
    left = [run for run in runs if ledger.find(run) is None]
    while left:
        if not ledger.perform_first(left, partial(judge, folder=folder), lambda run: None):
            time.sleep(_WAIT)
        ledger.reload()
        before = len(left)
        left = [run for run in runs if ledger.find(run) is None]
        if len(left) < before:  # nothing is, while other processes do all that is left
            report(len(runs) - len(left))


def judge(kept: Kept, folder: Path) -> Row:
    """Scores under each condition.

    Returns:
        A JSON line: the run's key; ``conditions``, by name the :func:`~recipes.evidence.scores.both_scores` of the test
        part and the ``temperature``, fitted on the validation part without typos, with the same change of the weights;
        ``seconds``, ``device``, ``commit`` and versions.
    """
    began = time.perf_counter()
    found = {name: _scores(kept, folder, condition) for name, condition in CONDITIONS.items()}
    return kept.key() | {"conditions": found, "seconds": time.perf_counter() - began, **surroundings()}


def _scores(kept: Kept, folder: Path, condition: Condition) -> dict[str, float]:
    """In float32, in which rounding is what the condition does and nothing else."""
    settings = kept.run.settings
    encoder = encoder_of(settings)
    classes = len(texts.TASKS[settings["data"]].classes)
    # Anew for each condition, because merging and rounding can't be undone exactly.
    module = ShotsClassifier(encoder, classes, settings, kept.run.config)
    restore(module, folder / kept.weights)
    if condition.change is not None:
        condition.change(module)
    validation = plain_logits(module, held_out(encoder, settings["data"], "validation"))
    test = plain_logits(module, _test_batches(encoder, settings["data"], condition.typos))
    temperature = fitted_temperature(*validation)
    return {**both_scores(*test, temperature), "temperature": temperature}


@cache
def _test_batches(encoder: CutEncoder, data: str, typos: float) -> list[Batch]:
    """The lower layers compute the texts with typos once in a process, too."""
    if not typos:
        return held_out(encoder, data, "test")
    examples = texts.parts(data)["test"]
    typed = [example._replace(text=with_typos(example.text, typos)) for example in examples]
    return evaluation_batches(typed, encoder.states)
