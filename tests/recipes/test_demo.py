"""The demo: its measurements on a tiny encoder, and what it reports, keeps and shares."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers

from recipes.demo import run as running
from recipes.demo.__main__ import main
from recipes.demo.data import evaluation_batches
from recipes.demo.encoder import CutEncoder
from recipes.demo.module import TaskClassifier
from recipes.demo.run import ARMS, DISTANCES, RATES, SEEDS, Run, Settings, perform
from recipes.language import texts
from recipes.language.texts import Example, Source
from recipes.shared import packaged
from recipes.shared.ledger import Row

# What a task consists of is kept in a process, for other tests too: so this is a name that no other test uses.
TASK = "demo_test"
SETTINGS = Settings(TASK, frozen_layers=1, length=32, shots=4, steps=2, batch_size=4, precision="32-true")


def made_up() -> Iterator[Example]:
    for label, word in enumerate(("heart", "tooth")):
        for number in range(60):
            text = f"{word} {'and so on ' * (number % 4)}{number}"
            yield Example(text, label, text)


@pytest.fixture(scope="module")
def encoder() -> CutEncoder:
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.minilm())
    return CutEncoder(transformers.BertModel(config, add_pooling_layer=False), tokenizer, frozen_layers=1, length=32)


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_repeats_and_measures_the_loss_around_its_weights(
    arm: str, encoder: CutEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(texts.TASKS, TASK, Source(("heart", "teeth"), made_up))
    monkeypatch.setattr(running, "_load", lambda frozen_layers, length: encoder)
    row = perform(Run(arm, 1e-2, 40, SETTINGS))
    losses = row["losses_around"]
    assert len(losses) == len(DISTANCES)
    assert row["validation_loss"] == losses[0] < losses[1] < losses[2]  # upwards, along the steepest direction
    again = perform(Run(arm, 1e-2, 40, SETTINGS))
    assert (again["losses_around"], again["train_loss"]) == (losses, row["train_loss"])


def test_the_mean_loss_weighs_each_text_alike(encoder: CutEncoder) -> None:
    examples = list(made_up())[:70]  # two batches of different sizes
    module = TaskClassifier(encoder, 2, learning_rate=1e-3).eval()
    batches = evaluation_batches(examples, encoder.states)
    assert [len(batch["labels"]) for batch in batches] == [64, 6]
    logits = torch.cat([module.logits(batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    torch.testing.assert_close(running._loss(module, batches)(), torch.nn.functional.cross_entropy(logits, labels))


def test_the_demo_reports_resumes_and_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Run] = []

    def invented(run: Run) -> Row:
        """A loss that LoRA's rate raises, by half as much with dropout and not at all with EFMLoRA."""
        begun.append(run)
        if len(begun) == 5:
            raise KeyboardInterrupt
        steepness = {"LoRA": 200.0, "LoRA, dropout 0.9": 100.0, "EFMLoRA": 0.0}[run.arm]
        loss = 2.0 + steepness * run.rate + 0.01 * (run.seed % 3)
        around = [loss + steepness * run.rate * distance for distance in DISTANCES]
        return {**run.key(), "validation_loss": loss, "validation_accuracy": 0.4, "losses_around": around}

    monkeypatch.setattr(running, "perform", invented)
    options = ["--folder", str(tmp_path), "--precision", "32-true"]
    assert main([*options, "--processes", "1"]) == 130
    assert "The same command resumes" in capsys.readouterr().out
    assert main([*options, "--processes", "1"]) == 0
    assert [(run.seed, run.rate, run.arm) for run in begun[5:]] == list(product(SEEDS, RATES, ARMS))[4:]
    shown = " ".join(capsys.readouterr().out.split())
    assert "EFMLoRA less that of LoRA is -0.80 [-0.80, -0.80] nats" in shown
    assert "less that of LoRA with dropout 0.9 -0.40 [-0.40, -0.40]" in shown
    assert "2.410 ± 0.006" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "demo.png").stat().st_size > 10_000

    # A second process finds everything done; without a stub, it would train.
    rows = (tmp_path / "results.jsonl").read_text()
    assert main(options) == 0
    assert (tmp_path / "results.jsonl").read_text() == rows
    assert len({json.dumps(json.loads(row)["seed"]) for row in rows.splitlines()}) == len(SEEDS)
