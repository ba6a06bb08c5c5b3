"""The merging demo: merged weights against dense references, the parts of a run, and the whole on a tiny encoder."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo_parts import bert, cut_in_two, made_up, stopped_and_resumed
from torch import Tensor

from recipes.demo import merging as command
from recipes.demo import merging_run as running
from recipes.demo.data import packed
from recipes.demo.encoder import CutEncoder, pooled
from recipes.demo.merging import main
from recipes.demo.merging_run import ARMS, FROZEN, SEEDS, WAYS, Run, Settings, merged, perform
from recipes.demo.module import TaskClassifier, linear_classifier
from recipes.language import texts
from recipes.language.texts import Example, Source
from recipes.shared import packaged
from recipes.shared.ledger import Row

# What a task consists of is kept in a process, for other tests too: so these have names that no other test uses.
TASKS = ("merging_a", "merging_b", "merging_c")
LAYERS = ["layer.0.attention.self.query", "layer.0.attention.self.value"]
SETTINGS = Settings(
    tasks=TASKS, frozen_layers=1, shots=4, steps=2, batch_size=4, validation=8, test=10, precision="32-true"
)


@pytest.fixture(scope="module")
def wordpieces() -> Any:
    return transformers.AutoTokenizer.from_pretrained(packaged.minilm())


@pytest.fixture(scope="module")
def encoder() -> CutEncoder:
    return cut_in_two()


@pytest.fixture
def tiny(encoder: CutEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in TASKS:
        monkeypatch.setitem(texts.TASKS, task, Source(("heart", "teeth"), made_up))
    monkeypatch.setattr(running, "kept", lambda frozen_layers, length: encoder)


def adapters(encoder: CutEncoder, number: int) -> list[TaskClassifier]:
    """In float64, with factors that do something."""
    generator = torch.Generator().manual_seed(0)
    modules = []
    for _ in range(number):
        module = TaskClassifier(encoder, 2, learning_rate=1e-2, rank=2).double()
        for name, parameter in module.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        modules.append(module)
    return modules


def updates(modules: list[TaskClassifier], layer: str) -> Tensor:
    """s B A of each adapter, (adapters, m, n), from the factors themselves."""
    found = []
    for module in modules:
        adapted = module.net.get_submodule(f"base_model.model.{layer}")
        found.append(2.0 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight)
    return torch.stack(found).detach()


def by_ties(each: Tensor) -> Tensor:
    """Density 0.5 and weight 1 (arXiv 2306.01708)."""
    kept = torch.zeros_like(each)
    for place, update in enumerate(each):
        median = update.abs().flatten().sort().values[update.numel() // 2]
        kept[place] = torch.where(update.abs() >= median, update, 0.0)
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = kept * elected > 0
    return (kept * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


REFERENCES = {"average": lambda each: each.mean(dim=0), "task arithmetic": lambda each: 0.4 * each.sum(dim=0)}
REFERENCES["TIES"] = by_ties


@pytest.mark.parametrize("way", WAYS)
def test_merged_weights_are_a_dense_reference_of_the_whole_updates(way: str, encoder: CutEncoder) -> None:
    modules = adapters(encoder, 6)
    pretrained = encoder.upper().double()
    found = merged(encoder.upper().double(), [module.net for module in modules], WAYS[way])
    for name, weight in found.named_parameters():
        layer = name.removesuffix(".weight")
        before = pretrained.get_parameter(name)
        expected = before + REFERENCES[way](updates(modules, layer)) if layer in LAYERS else before
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen_layers", [1, 3])
def test_kept_lower_layers_and_upper_ones_are_the_whole_model(wordpieces: Any, frozen_layers: int) -> None:
    model = bert(4, torch.float64).eval()
    cut = CutEncoder(model, wordpieces, frozen_layers, length=16)
    examples = [Example("a heart", 0, ""), Example("one tooth and so on, and on, " * 5, 1, ""), Example("eye", 1, "")]
    batch = packed(examples, cut.states)
    found = pooled(cut.upper()(batch["hidden"], batch["owners"]), batch["owners"], len(examples))
    for example, mean in zip(examples, found, strict=True):
        inputs = wordpieces(example.text, truncation=True, max_length=16, return_tensors="pt")
        torch.testing.assert_close(mean, model(**inputs).last_hidden_state[0].mean(dim=0), rtol=0, atol=1e-12)


def test_the_linear_classifier_separates_what_can_be_separated() -> None:
    features, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    classifier = linear_classifier(features, labels, (features, labels), classes=3)
    assert torch.equal(classifier(features).argmax(dim=1), labels)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("arm", ["EFMLoRA", FROZEN])
def test_a_run_repeats_and_its_row_says_what_it_was(arm: str) -> None:
    row = perform(Run(arm, 20, SETTINGS))
    assert row["config"] == ARMS[arm]
    assert tuple(row["single"]) == TASKS
    assert list(row.get("merged", {})) == ([] if arm == FROZEN else [*WAYS])
    again = perform(Run(arm, 20, SETTINGS))
    assert (again["single"], again.get("merged")) == (row["single"], row.get("merged"))


@pytest.mark.usefixtures("tiny")
def test_the_demo_runs_resumes_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Run] = []

    def invented(run: Run) -> Row:
        """With an accuracy before merging that is 10 points higher, and 5 points more for EFMLoRA."""
        begun.append(run)
        if len(begun) == 5:
            raise KeyboardInterrupt
        accuracy = 0.6 + 0.001 * run.seed % 3 + 0.05 * (run.arm == "EFMLoRA")
        after = {} if run.arm == FROZEN else {"merged": {way: dict.fromkeys(TASKS, accuracy) for way in WAYS}}
        return {**run.key(), "single": dict.fromkeys(TASKS, accuracy + 0.1), **after}

    monkeypatch.setattr(command, "perform", invented)
    shown = stopped_and_resumed(main, tmp_path, [], capsys)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == list(product(SEEDS, ARMS))
    assert "in points of accuracy, 3 seeds: minus LoRA +5.00 [+5.00, +5.00]" in shown
    assert "+5.00 [+5.00, +5.00]" in (tmp_path / "table.txt").read_text()
    monkeypatch.setattr(command, "perform", lambda run: pytest.fail("done twice"))
    assert main(["--folder", str(tmp_path), "--precision", "32-true"]) == 0
