"""The program of evidence end to end, on a tiny random encoder and short made-up texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evidence_runs import RUN, SETTINGS, WORK, Fake, bert, figures, tiny_encoder, wordpieces, work_by_pieces
from safetensors import safe_open

from recipes.evidence import commands
from recipes.evidence import plan as planning
from recipes.evidence import run as running
from recipes.evidence.__main__ import main
from recipes.evidence.data import packed
from recipes.evidence.encoder import CutEncoder, pooled
from recipes.evidence.module import ShotsClassifier, all_logits
from recipes.evidence.plan import RESULTS, STAGES, Plan
from recipes.evidence.run import Run, perform
from recipes.evidence.scores import scores
from recipes.evidence.search import Grid
from recipes.evidence.weights import restore
from recipes.evidence.workloads import (
    ARMS,
    CHOSEN_OTHERWISE,
    COMPETITORS,
    EXPLORED,
    PROBE,
    SEARCHES,
)
from recipes.language.texts import Example
from recipes.shared.ledger import Row


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return wordpieces()


@pytest.fixture
def encoder() -> CutEncoder:
    return tiny_encoder()


pytestmark = pytest.mark.usefixtures("evidence")


# -- the cut encoder


@pytest.mark.parametrize("frozen_layers", [1, 2, 3])
def test_kept_lower_layers_and_upper_ones_are_the_whole_model(tokenizer: Any, frozen_layers: int) -> None:
    model = bert(4, torch.float64).eval()
    cut = CutEncoder(model, tokenizer, frozen_layers, length=16)
    examples = [Example("a heart", 0, ""), Example("one tooth and so on, and on, " * 5, 1, ""), Example("eye", 2, "")]
    batch = packed(examples, cut.states)
    found = pooled(cut.upper()(batch["hidden"], batch["owners"]), batch["owners"], len(examples))
    for example, mean in zip(examples, found, strict=True):
        inputs = tokenizer(example.text, truncation=True, max_length=16, return_tensors="pt")
        torch.testing.assert_close(mean, model(**inputs).last_hidden_state[0].mean(dim=0), rtol=0, atol=1e-12)


# -- runs


def test_a_run_repeats_and_its_row_says_what_it_was() -> None:
    row = perform(RUN)
    assert figures(row) == figures(perform(RUN))
    assert {"commit", "device", "torch", "seconds", "chance"} <= set(row)
    assert row["settings"]["precision"] == "32-true"
    assert not row["failed"]
    assert figures(perform(replace(RUN, seed=1))) != figures(row)


@pytest.mark.parametrize("method", [method for method in SEARCHES if method != "lora"])
def test_size_0_is_lora_bit_for_bit(method: str) -> None:
    """Which is why all methods share the runs at size 0."""
    (size,) = Grid().settings(method)[1]
    at_0 = replace(RUN, arm=method, config={**RUN.config, size: 0.0})
    assert figures(perform(at_0)) == figures(perform(RUN))
    larger = replace(RUN, arm=method, config={**RUN.config, size: 0.5})
    assert figures(perform(larger)) != figures(perform(RUN))


def test_early_stopping_keeps_the_weights_of_the_lowest_validation_loss() -> None:
    # At this rate the loss rises.
    long = replace(RUN, settings={**SETTINGS, "steps": 40}, config={"learning_rate": 0.3})
    stopped = replace(long, arm="early_stopping", config={**long.config, "early_stopping": True})
    found, last = perform(stopped), perform(long)
    assert found["validation_loss"] < last["validation_loss"]
    assert figures(found["at_end"]) == figures(last)
    assert "at_end" not in last
    # So are all runs judged where the workload says so, and nothing is left for early stopping to change.
    judged = replace(long, settings={**long.settings, "judged": "best"})
    assert figures(perform(judged)) == figures(found)
    plan = Plan(Path("nowhere"), "tiny", judged.settings, ARMS, STAGES, range(20))
    assert [piece.number for piece in plan.pieces()[:4]] == [105, 40, 20, 60]


def test_a_run_that_diverges_counts_as_chance() -> None:
    row = perform(replace(RUN, config={"learning_rate": 1e38}))
    assert row["failed"]
    assert row["test_accuracy"] == row["chance"] == 1 / 3
    assert row["test_loss"] is None


def test_a_search_never_sees_the_test_part() -> None:
    row = perform(replace(RUN, stage="search"))
    assert "validation_loss" in row
    assert not any(name.startswith("test") for name in row)


@pytest.mark.parametrize("judged", ["end", "best"])
def test_a_run_on_test_keeps_the_weights_that_it_is_judged_by(judged: str, tmp_path: Path, encoder: CutEncoder) -> None:
    # At this rate the last weights are not the best ones.
    run = replace(RUN, settings={**SETTINGS, "judged": judged, "steps": 40}, config={"learning_rate": 0.3, "rank": 1})
    row = perform(run, tmp_path)
    assert figures(row) == figures(perform(run))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == [row["weights"]]
    module = ShotsClassifier(encoder, 3, run.settings, run.config)
    restore(module, tmp_path / row["weights"])
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert scores(*all_logits(module, running.held_out(encoder, "tiny", "test")))["loss"] == row["test_loss"]
    with safe_open(tmp_path / row["weights"], "pt") as file:
        assert json.loads(file.metadata()["run"]) == run.key() == planning.key_of_row(row)
    with pytest.raises(ValueError, match="does not hold the weights of this configuration"):
        restore(ShotsClassifier(encoder, 3, SETTINGS, RUN.config), tmp_path / row["weights"])


# -- the plan


FREE = (*COMPETITORS, PROBE)


def small_plan(folder: Path, arms: Any = ARMS, stages: Any = STAGES) -> Plan:
    return Plan(folder, "tiny", SETTINGS, arms, stages, range(20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Run]]:
    """A plan whose runs are done, and those in their order."""
    fake = Fake(gain=0.05)
    plan = small_plan(tmp_path_factory.mktemp("finished"), ["lora", "efmlora", "fmlora", *FREE])
    work_by_pieces(plan, fake, lambda run: None)
    return plan, fake.done


def test_the_order_of_a_plan(finished: tuple[Plan, list[Run]]) -> None:
    plan, runs = finished
    assert plan.open_runs() == []
    assert all(done == total for _, done, total, _ in plan.progress())
    # 20 trials of LoRA, 15 of the other two: those at size 0 are LoRA's.
    searches = [run for run in runs if run.stage == "search"]
    assert len(searches) == (20 + 2 * 15) * 3
    assert len({str(run) for run in runs}) == len(runs)
    first_test = next(place for place, run in enumerate(runs) if run.stage == "test")
    assert first_test == (20 + 15) * 3
    assert {run.arm for run in runs[:first_test]} == {"lora", "efmlora"}
    tests = runs[first_test:]
    assert {run.arm for run in tests[:16]} == {"lora", "efmlora"}
    assert {run.seed for run in tests[:16]} == set(range(8))
    assert {run.arm for run in tests[40:60]} == {PROBE}
    assert {run.arm for run in tests[60:140]} == set(COMPETITORS)
    # What is searched next has chosen size 0, and so has LoRA's runs.
    assert {run.arm for run in runs[first_test + 140 :]} == {"fmlora"}
    assert len(tests) == 140 + 45
    stopped = next(run for run in tests if run.arm == "early_stopping")
    assert stopped.config == {"learning_rate": 2e-3, "early_stopping": True}
    assert {str(run.config) for run in tests if run.arm == "efmlora"} == {"{'learning_rate': 0.002, 'rho': 2.0}"}


def test_a_workload_without_a_gain_ends_after_eight_seeds(tmp_path: Path) -> None:
    fake, plan = Fake(gain=0.0), small_plan(tmp_path)
    plan.work(fake, lambda run: None)
    assert plan.has_ended_early
    tests = [run for run in fake.done if run.stage == "test"]
    assert {run.arm for run in tests[:16]} == {"lora", "efmlora"}
    # The probe stands beside every result, and what is explored goes with the runs that there are.
    assert {run.arm for run in tests[16:]} == {PROBE, *EXPLORED, *CHOSEN_OTHERWISE}
    assert {run.seed for run in tests[16:]} == set(range(8))


def test_an_interrupted_plan_resumes_and_two_processes_share_it(tmp_path: Path) -> None:
    first, fake = small_plan(tmp_path, ["lora"], ["search"]), Fake(gain=0.05)

    def interrupted(run: Run) -> Row:
        if len(fake.done) == 10:
            raise KeyboardInterrupt
        return fake(run)

    with pytest.raises(KeyboardInterrupt):
        WORK(first, interrupted, lambda run: None)
    second = small_plan(tmp_path, ["lora"], ["search"])
    claimed = second.open_runs()[0]
    with first.ledger.claimed(claimed) as is_mine:  # by another process
        assert is_mine
        assert second.ledger.perform_first(second.open_runs(), fake, lambda run: None)
    assert len(fake.done) == 11
    assert claimed not in fake.done
    WORK(second, fake, lambda run: None)
    assert len(fake.done) == len({str(run) for run in fake.done}) == 60


# -- the command


def test_the_command_does_what_is_left_and_reports(
    tmp_path: Path,
    finished: tuple[Plan, list[Run]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = ["--workload", "tiny", "--folder", str(tmp_path), "--precision", "32-true"]
    folder += ["--methods", "lora", "efmlora", *FREE]
    with pytest.raises(SystemExit, match="holds no run"):
        main(["report", *folder])
    assert main(["run", *folder, "--plan"]) == 0
    assert "search, lora, efmlora: 0 of 105 runs done" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    lines = (finished[0].folder / RESULTS).read_text().splitlines(keepends=True)
    few = [line for line in lines if json.loads(line)["seed"] in (0, 1, 2, 100, 101, 102)]
    (tmp_path / RESULTS).write_text("".join(few))
    assert main(["report", *folder]) == 0
    assert "no verdict yet, with 3 of 20 seeds" in capsys.readouterr().out
    last = lines.pop()
    (tmp_path / RESULTS).write_text("".join(lines))
    fake = Fake(gain=0.05)
    monkeypatch.setattr(commands, "perform", fake)
    assert main(["run", *folder, "fmlora"]) == 0
    assert [run.key() for run in fake.done] == [planning.key_of_row(json.loads(last))]
    assert main(["report", *folder]) == 0
    assert "EFMLoRA minus LoRA, 20 seeds: **gain**" in capsys.readouterr().out


@pytest.mark.parametrize(("workload", "name"), [("w3", "perform_merging"), ("w5", "perform_in_turn")])
def test_the_command_trains_as_its_workload_says(workload: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    fake = Fake(gain=0.05)
    monkeypatch.setattr(commands, name, fake)
    options = ["--workload", workload, "--folder", str(tmp_path), "--precision", "32-true", "--methods", "lora"]
    assert main(["run", *options, "--stages", "search"]) == 0
    assert {run.workload for run in fake.done} == {workload}
