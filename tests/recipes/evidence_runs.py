"""A tiny workload of the program of evidence: a random encoder, and short made-up texts in three classes."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from recipes.evidence import __main__ as command
from recipes.evidence import plan as planning
from recipes.evidence import run as running
from recipes.evidence.encoder import CutEncoder
from recipes.evidence.plan import Plan
from recipes.evidence.run import Run
from recipes.evidence.workloads import ON_DROPOUT, WORKLOADS
from recipes.language import texts
from recipes.language.texts import Example, Source
from recipes.shared import packaged
from recipes.shared.ledger import Row

WORDS = (("heart", "blood", "vein"), ("tooth", "gum", "molar"), ("eye", "lens", "retina"))
SETTINGS = {**WORKLOADS["w1"], "data": "tiny", "shots": 4, "steps": 4, "batch_size": 4, "rank": 2, "frozen_layers": 1}
SETTINGS["precision"] = "32-true"
RUN = Run("tiny", SETTINGS, "lora", {"learning_rate": 1e-2}, seed=0, stage="test")
FOUND = ("train_loss", "validation_loss", "test_loss", "test_accuracy", "test_ece", "test_brier_scaled", "temperature")


def figures(row: Row) -> dict[str, float]:
    return {name: row[name] for name in FOUND}


def made_up() -> Iterator[Example]:
    for label, words in enumerate(WORDS):
        for number in range(40):
            text = f"{words[number % 3]} {'and so on ' * (number % 4)}{number}"
            yield Example(text, label, text)


def bert(layers: int, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype)


@cache
def wordpieces() -> Any:
    return transformers.AutoTokenizer.from_pretrained(packaged.minilm())


@cache
def tiny_encoder() -> CutEncoder:
    return CutEncoder(bert(2), wordpieces(), frozen_layers=1, length=32)


def work_by_pieces(plan: Plan, perform: Callable[[Run], Row], report: Callable[[Run], None]) -> None:
    """Do what Plan.work does, which looks at all runs again after each one; here once for each piece of the plan.

    Runs that take no time are thus done in a tenth of it. The method itself is :data:`WORK`.
    """
    pieces = [plan._missing(piece.runs) for piece in plan.pieces()]
    while any(pieces):
        for run in next(runs for runs in pieces if runs):
            report(run)
            plan.ledger.append(perform(run))
        pieces = [plan._missing(piece.runs) for piece in plan.pieces()]


WORK = Plan.work


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the workload "tiny" known, with the tiny encoder in place of the packaged one."""
    monkeypatch.setitem(texts.TASKS, "tiny", Source(("heart", "teeth", "eyes"), made_up))
    monkeypatch.setitem(command.WORKLOADS, "tiny", {name: v for name, v in SETTINGS.items() if name != "precision"})
    monkeypatch.setattr(running, "_load", lambda frozen_layers, length: tiny_encoder())
    monkeypatch.setattr(planning, "_WAIT", 0.01)
    monkeypatch.setattr(Plan, "work", work_by_pieces)


class Fake:
    """Stands in for training: EFMLoRA at rho 2 and a rate of 2e-3 are best; weight decay helps accuracy alone."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.done: list[Run] = []

    def __call__(self, run: Run, folder: Path | None = None) -> Row:
        self.done.append(run)
        rate = run.config.get("learning_rate", 2e-3)
        is_better = run.arm in ("efmlora", ON_DROPOUT) and run.config["rho"] == 2.0
        decays = "weight_decay" in run.config
        loss = 1 + abs(rate - 2e-3) - 0.1 * is_better + 0.01 * decays
        accuracy = (
            0.5 + 0.004 * decays + 0.01 * (run.seed % 3) + self.gain * is_better + 1e-3 * (run.seed % 2) * is_better
        )
        row = {"failed": False, "seconds": 1.0, "chance": 1 / 3, "train_loss": 0.1}
        for part in ("validation", "test"):
            for name in ("loss", "ece", "brier", "loss_scaled", "ece_scaled", "brier_scaled"):
                # Less than a guess at random has: seeds of a search begin at 100.
                row[f"{part}_{name}"] = loss + 0.01 * (run.seed % 100)
            row[f"{part}_accuracy"] = accuracy
        return run.key() | row
