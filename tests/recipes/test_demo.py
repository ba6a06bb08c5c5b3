"""The demo: its measurements on a tiny encoder, and what it reports, keeps and shares."""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

from recipes.demo import run as running
from recipes.demo.__main__ import main
from recipes.demo.data import evaluation_batches, packed
from recipes.demo.encoder import CutEncoder, pooled
from recipes.demo.module import TaskClassifier
from recipes.demo.run import ARMS, DISTANCES, RATES, SEEDS, DemoRun, perform
from recipes.demo.training import Settings
from recipes.offline import packaged, texts
from recipes.offline.texts import Example, Source
from recipes.studies.ledger import Row

# What a task consists of is kept in a process, for other tests too: so this is a name that no other test uses.
TASK = "demo_test"
SETTINGS = Settings(task=TASK, frozen_layers=1, shots=4, steps=2, batch_size=4, precision="32-true")


def made_up() -> Iterator[Example]:
    for label, words in enumerate((("heart", "blood", "vein"), ("tooth", "gum", "molar"))):
        for number in range(60):
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
def cut_in_two() -> CutEncoder:
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.minilm())
    return CutEncoder(bert(2), tokenizer, frozen_layers=1, length=32)


@pytest.mark.parametrize("frozen_layers", [1, 3])
def test_kept_lower_layers_and_upper_ones_are_the_whole_model(frozen_layers: int) -> None:
    wordpieces = transformers.AutoTokenizer.from_pretrained(packaged.minilm())
    model = bert(4, torch.float64).eval()
    cut = CutEncoder(model, wordpieces, frozen_layers, length=16)
    examples = [Example("a heart", 0, ""), Example("one tooth and so on, and on, " * 5, 1, ""), Example("eye", 1, "")]
    batch = packed(examples, cut.states)
    found = pooled(cut.upper()(batch["hidden"], batch["owners"]), batch["owners"], len(examples))
    for example, mean in zip(examples, found, strict=True):
        inputs = wordpieces(example.text, truncation=True, max_length=16, return_tensors="pt")
        torch.testing.assert_close(mean, model(**inputs).last_hidden_state[0].mean(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_repeats_and_measures_the_loss_around_its_weights(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.TASKS, TASK, Source(("heart", "teeth"), made_up))
    monkeypatch.setattr(running, "kept", lambda frozen_layers, length: cut_in_two())
    row = perform(DemoRun(arm, 1e-2, 40, SETTINGS))
    losses = row["losses_around"]
    assert len(losses) == len(DISTANCES)
    assert row["validation_loss"] == losses[0] < losses[1] < losses[2]  # upwards, along the steepest direction
    again = perform(DemoRun(arm, 1e-2, 40, SETTINGS))
    assert again["losses_around"] == losses


def test_the_mean_loss_weighs_each_text_alike() -> None:
    encoder = cut_in_two()
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
    begun: list[DemoRun] = []

    def invented(run: DemoRun) -> Row:
        """A loss that LoRA's rate raises, by half as much with dropout and not at all with EFMLoRA."""
        begun.append(run)
        if len(begun) == 5:
            raise KeyboardInterrupt
        steepness = {"LoRA": 200.0, "LoRA, dropout 0.9": 100.0, "EFMLoRA": 0.0}[run.arm]
        loss = 2.0 + steepness * run.rate + 0.01 * (run.seed % 3)
        around = [loss + steepness * run.rate * distance for distance in DISTANCES]
        return {**run.key(), "validation_loss": loss, "losses_around": around}

    monkeypatch.setattr(running, "perform", invented)
    assert main(tmp_path, processes=1) == 130  # in the fifth run
    assert "The same command resumes" in capsys.readouterr().out
    assert main(tmp_path, processes=1) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [(run.seed, run.rate, run.arm) for run in begun[5:]] == list(product(SEEDS, RATES, ARMS))[4:]
    assert "to LoRA: validation loss -0.80 [-0.80, -0.80], rise -25.60 [-25.60, -25.60]" in shown
    assert "to LoRA, dropout 0.9: validation loss -0.40 [-0.40, -0.40], rise -12.80" in shown
    assert "2.410 ± 0.006" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "demo.png").stat().st_size > 10_000

    # A second process finds everything done; without a stub, it would train.
    rows = (tmp_path / "results.jsonl").read_text()
    assert main(tmp_path) == 0
    assert (tmp_path / "results.jsonl").read_text() == rows


def test_a_run_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "perform", lambda run: run.key())
    runs, found = [DemoRun("LoRA", 1e-3, seed, SETTINGS) for seed in (1, 2)], list[Row]()
    thread = Thread(target=lambda: found.extend(running.share(tmp_path, runs)))
    with running.ledger(tmp_path).claimed(runs[0]):
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
    thread.join(timeout=60)
    assert found == [run.key() for run in runs]  # in their order, and done here once the other process has stopped
