"""Adapters merged by peft's functions against dense references, and a run, its row and its report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_runs import Fake, tiny_encoder
from torch import Tensor

from recipes.evidence import __main__ as command
from recipes.evidence import demo, merge_weights
from recipes.evidence import plan as planning
from recipes.evidence.__main__ import main
from recipes.evidence.merging import FEWER, WAYS, merged, perform_merging
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.plan import RESULTS
from recipes.evidence.run import Run
from recipes.evidence.workloads import (
    MORE_DROPOUT,
    MORE_DROPOUT_RANK_2,
    PROBE,
    SEARCH_SEEDS,
    SEEDS,
    WORKLOADS,
)
from recipes.language import texts
from recipes.language.texts import Source
from recipes.shared.ledger import Row

# Not "tiny" itself: what a task consists of is kept in a process, for other tests too.
TASKS = ["tiny_a", "tiny_b", "tiny_c", "tiny_d", "tiny_e"]
W3 = {**WORKLOADS["w3"], "tasks": TASKS, "shots": 4, "steps": 2, "batch_size": 4, "rank": 2, "frozen_layers": 1}
W3 |= {"validation": 8, "test": 10, "precision": "32-true"}
RUN = Run("w3", W3, "lora", {"learning_rate": 1e-2}, seed=0, stage="test")
LAYERS = ["layer.0.attention.self.query", "layer.0.attention.self.value"]


@pytest.fixture(autouse=True)
def tiny(evidence: None, monkeypatch: pytest.MonkeyPatch) -> None:
    three = texts.TASKS["tiny"].read

    def two_classes() -> Any:
        return (example for example in three() if example.label < 2)

    for task in TASKS:
        monkeypatch.setitem(texts.TASKS, task, Source(("heart", "teeth"), two_classes))


def adapters(number: int) -> list[ShotsClassifier]:
    """In float64, with factors that do something."""
    generator = torch.Generator().manual_seed(0)
    modules = []
    for _ in range(number):
        module = ShotsClassifier(tiny_encoder(), 2, W3, RUN.config).double()
        for name, parameter in module.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        modules.append(module)
    return modules


def updates(modules: list[ShotsClassifier], layer: str) -> Tensor:
    """s B A of each adapter, (adapters, m, n), from the factors themselves."""
    found = []
    for module in modules:
        adapted = module.net.get_submodule(f"base_model.model.{layer}")
        found.append(2.0 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight)
    return torch.stack(found).detach()


def by_ties(each: Tensor) -> Tensor:
    """Density 0.5 and weight 1, one entry after the other (arXiv 2306.01708)."""
    kept = torch.zeros_like(each)
    for place, update in enumerate(each):
        median = update.abs().flatten().sort().values[update.numel() // 2]
        kept[place] = torch.where(update.abs() >= median, update, 0.0)
    result = torch.zeros_like(each[0])
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            entries = kept[:, row, column]
            elected = 1.0 if entries.sum() >= 0 else -1.0
            agreeing = entries[entries * elected > 0]
            if len(agreeing):
                result[row, column] = agreeing.mean()
    return result


REFERENCES = {"average": lambda each: each.mean(dim=0), "task_arithmetic": lambda each: 0.4 * each.sum(dim=0)}
REFERENCES["ties"] = by_ties


# -- merging


@pytest.mark.parametrize("way", WAYS)
def test_merged_weights_are_a_dense_reference_of_the_whole_updates(way: str) -> None:
    modules = adapters(6)
    pretrained = tiny_encoder().upper().double()
    found = merged(tiny_encoder().upper().double(), [module.net for module in modules], way, W3)
    for name, weight in found.named_parameters():
        layer = name.removesuffix(".weight")
        before = pretrained.get_parameter(name)
        expected = before + REFERENCES[way](updates(modules, layer)) if layer in LAYERS else before
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


# -- runs


def test_a_run_says_what_it_was_and_what_merging_keeps(tmp_path: Path) -> None:
    row = perform_merging(RUN, tmp_path)
    assert {"commit", "device", "torch", "seconds", "processor_seconds", "train_loss", "temperature"} <= set(row)
    assert json.loads(json.dumps(row)) == row
    assert planning.key_of_row(row) == RUN.key()
    assert row["chance"] == 0.5
    assert not row["failed"]
    assert list(row["single"]) == TASKS
    assert list(row["merged"]) == list(WAYS)
    assert list(row["fewer"]) == [str(number) for number in FEWER]
    assert list(row["fewer"]["2"]) == TASKS[:2]
    of_ties = row["merged"]["ties"]
    for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
        assert row[name] == pytest.approx(sum(of_ties[task][name] for task in TASKS) / 5, abs=1e-12)
    again = perform_merging(RUN)
    assert again["merged"] == row["merged"]
    assert perform_merging(replace(RUN, seed=1))["single"] != row["single"]


def test_a_search_has_only_what_it_chooses_by(tmp_path: Path) -> None:
    row = perform_merging(replace(RUN, stage="search"), tmp_path)
    assert list(row["merged"]) == ["ties"]
    assert row["fewer"] == {}
    assert "test" not in json.dumps({name: row[name] for name in row if name not in RUN.key()})
    assert not list(tmp_path.iterdir())


# -- kept adapters, merged with a weight that is chosen


def test_the_weights_of_a_run_give_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.WORKLOADS, "w3", {name: v for name, v in W3.items() if name != "precision"})
    row = perform_merging(RUN, tmp_path)
    (tmp_path / RESULTS).write_text(json.dumps(row) + "\n")
    fixed = {"task_arithmetic": (W3["arithmetic_weight"],), "ties": (W3["ties_weight"],)}
    monkeypatch.setattr(merge_weights, "WEIGHTS", fixed)
    options = ["--workload", "w3", "--folder", str(tmp_path), "--precision", "32-true", "--methods", "lora"]
    assert main(["merge_weights", *options]) == 0
    found = json.loads((tmp_path / merge_weights.RESULTS).read_text())
    for way, of_way in found["ways"].items():
        for entry in ("test_accuracy", "test_loss"):
            of_tasks = [row["merged"][way][task][entry] for task in TASKS]
            assert of_way[entry] == pytest.approx(sum(of_tasks) / len(TASKS), abs=1e-12)
    assert found["ways"]["ties"]["validation_loss"]["1"] == pytest.approx(row["validation_loss"], abs=1e-12)


# -- the demo


class FakeMerging(Fake):
    """With an accuracy before merging that is 10 points higher."""

    def __call__(self, run: Run, folder: Path | None = None) -> Row:
        row = super().__call__(run, folder)
        if run.stage == "test":
            row["single"] = {task: {"test_accuracy": row["test_accuracy"] + 0.1} for task in TASKS}
            merged_ones = {task: {"test_accuracy": row["test_accuracy"]} for task in TASKS}
            row["merged"] = dict.fromkeys(WAYS, merged_ones)
            row["fewer"] = {str(number): merged_ones for number in FEWER}
        return row


def test_the_demo_runs_resumes_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SETTINGS", {name: value for name, value in W3.items() if name != "precision"})
    monkeypatch.setattr(demo, "perform_merging", FakeMerging(gain=0.05))
    options = ["demo", "--folder", str(tmp_path), "--precision", "32-true"]
    assert main(options) == 0
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert [row["seed"] for row in rows] == sorted([*demo.SEEDS] * 6)
    competitors = {"rank_2", MORE_DROPOUT, MORE_DROPOUT_RANK_2, PROBE}
    assert {row["arm"] for row in rows} == {"lora", "efmlora", *competitors}
    shown = " ".join(capsys.readouterr().out.split())
    assert "EFMLoRA after merging by TIES, in points of accuracy, 3 seeds: minus LoRA" in shown
    assert (tmp_path / "merging.png").stat().st_size > 10_000
    monkeypatch.setattr(demo, "perform_merging", lambda run: pytest.fail("done twice"))
    assert main(options) == 0


def test_the_demo_has_seeds_of_its_own() -> None:
    assert not {*SEEDS, *SEARCH_SEEDS} & {*demo.SEEDS}
