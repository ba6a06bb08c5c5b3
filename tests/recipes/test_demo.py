"""The demo: its measurements with a tiny encoder, and what it reports, keeps and shares."""

import math
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import transformers

from recipes.demo import __main__ as command
from recipes.demo import report
from recipes.demo import run as running
from recipes.demo.data import evaluation_batches, packed
from recipes.demo.encoder import CutEncoder, pooled
from recipes.demo.module import TaskClassifier
from recipes.demo.run import ARMS, DISTANCES, RATES, SEEDS, DemoRun, perform
from recipes.demo.training import Settings
from recipes.offline import packaged, texts
from recipes.offline.texts import Example, Source
from recipes.studies.rows import Row, append, read

# A task's data are cached in the process, for other tests too, so no other test may use this name.
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
    assert row["validation_loss"] == losses[0] < losses[1] < losses[2]  # it rises along the steepest direction
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


# Each method's best rate, the loss there, and how steeply it rises around the weights.
INVENTED = {
    "LoRA": (5e-4, 2.0, 0.2),
    "LoRA, dropout 0.9": (1e-3, 1.9, 0.3),
    "EFMLoRA, rho 32": (2e-3, 1.8, 0.1),
}


def invented(run: DemoRun) -> Row:
    """A made-up result: the loss rises by 0.1 with each doubling or halving of the best rate."""
    best, lowest, steepness = INVENTED[run.arm]
    loss = lowest + 0.1 * abs(math.log2(run.rate / best)) + 0.01 * (run.seed % 3)
    around = [loss + steepness * distance for distance in DISTANCES]
    return {**run.key(), "validation_loss": loss, "losses_around": around, "process": os.getpid()}


def invented_by_two(begun: Path, run: DemoRun) -> Row:
    """The same, but only after another process has also begun a run."""
    (begun / str(os.getpid())).touch()
    while len(list(begun.iterdir())) < 2:
        time.sleep(0.05)
    return invented(run)


def test_the_demo_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[DemoRun] = []

    def perform(run: DemoRun) -> Row:
        begun.append(run)
        if len(begun) == 5:
            raise KeyboardInterrupt
        return invented(run)

    monkeypatch.setattr(command, "perform", perform)
    other = invented(DemoRun("LoRA", RATES[0], SEEDS[0], replace(Settings(), steps=1)))  # it doesn't count
    append(tmp_path / "results.jsonl", other)
    assert command.main(tmp_path, processes=1) == 130  # interrupted in the fifth run
    assert "The same command resumes" in capsys.readouterr().out
    assert command.main(tmp_path, processes=1) == 0
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert [(run.seed, run.rate, run.arm) for run in begun[5:]] == list(product(SEEDS, RATES, ARMS))[4:]
    assert "[5/60] LoRA, dropout 0.9, learning rate 0.0005, seed 40" in shown
    assert "[60/60] EFMLoRA, rho 32, learning rate 0.004, seed 43" in shown
    every = "2.110 ± 0.004 2.010 ± 0.004 2.110 ± 0.004 2.210 ± 0.004 2.310 ± 0.004"
    assert f"LoRA {every} LoRA, dropout 0.9" in shown
    # Each method at its best rate, with EFMLoRA's differences.
    assert "LoRA 0.0005 2.010 ± 0.004 -0.200 [-0.200, -0.200] 6.40 ± 0.00 -3.20 [-3.20, -3.20]" in shown
    assert "LoRA, dropout 0.9 0.001 1.910 ± 0.004 -0.100 [-0.100, -0.100] 9.60 ± 0.00 -6.40 [-6.40, -6.40]" in shown
    assert "EFMLoRA, rho 32 0.002 1.810 ± 0.004 3.20 ± 0.00" in shown
    assert (tmp_path / "table.txt").read_text() in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000

    rows = (tmp_path / "results.jsonl").read_text()
    assert command.main(tmp_path) == 0
    assert len(begun) == 5 + 56  # a second start does nothing
    assert (tmp_path / "results.jsonl").read_text() == rows


def test_a_rate_at_which_a_run_has_diverged_is_not_the_best() -> None:
    rows = [invented(DemoRun("LoRA", rate, seed, Settings())) for rate, seed in product(RATES, SEEDS)]
    rows[0] = {**rows[0], "validation_loss": math.nan}  # at the lowest rate
    assert report._best_rate(rows, "LoRA") == 5e-4
    rows[4] = {**rows[4], "validation_loss": math.nan}
    assert report._best_rate(rows, "LoRA") == 1e-3


def test_two_processes_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: processes.SERVER)  # faster than importing all again
    monkeypatch.setattr(running, "perform", partial(invented_by_two, begun))
    monkeypatch.setattr("sys.argv", ["recipes.demo", f"--folder={tmp_path}/demo"])
    monkeypatch.delitem(sys.modules, command.__name__)
    with pytest.raises(SystemExit, match=r"^0$"):  # as the main program, from which the others can't import
        runpy.run_module("recipes.demo", run_name="__main__", alter_sys=True)
    rows = read(tmp_path / "demo" / "results.jsonl")
    assert len({(row["arm"], row["rate"], row["seed"]) for row in rows}) == len(rows) == 60
    assert {str(row["process"]) for row in rows} == {path.name for path in begun.iterdir()}
    assert os.getpid() not in {row["process"] for row in rows}
