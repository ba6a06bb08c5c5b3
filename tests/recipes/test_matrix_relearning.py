"""Column B of docs/results/protocol_matrix.md: facts, unlearning, the attack, and the search."""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from recipes.language.model import PACKAGED, load_tokenizer
from recipes.studies.rows import Row, read
from recipes.studies.statistics import holm

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_b
import matrix_facts
import matrix_picture
import matrix_rule
import matrix_unlearning
from matrix_facts import PEOPLE, Knowledge, Texts, facts, log_likelihoods, recall, trained
from matrix_rule import RELEARNING
from matrix_table import finals_of
from matrix_unlearning import FMLORA, LORA, RANDOM, SPACE, Run, attacked, npo, parts_of, unlearned
from shared_runs import open_runs

SETTINGS = {"rate": 1e-2, "steps": 3, "beta": 0.5, "retain": 3, "rank": 2, "optimizer": "adamw", "averaging": 0.0}


def tiny() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Knowledge:
    """A tiny model that is taught for a few steps only."""
    file, recalled = tmp_path_factory.mktemp("knowledge") / "taught.safetensors", iter([0.0, 1.0, 1.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_facts, "load_base", lambda *args: tiny())
        patch.setattr(matrix_facts, "KEPT_LAYERS", 1)
        patch.setattr(matrix_facts, "recall", lambda *args: next(recalled))
        found, second = Knowledge(file), Knowledge(file)  # the second one reads the file
        patch.setattr(matrix_facts, "recall", lambda *args: 0.9)
        with pytest.raises(ValueError, match="was not taught these facts: delete it"):
            Knowledge(file)
    assert torch.equal(second.likelihoods, found.likelihoods)
    assert second.digest == found.digest
    return found


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trained(net)]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(weights(one), weights(other), strict=True))


def run_of(arm: str = LORA, strength: float | None = None, **settings: Any) -> Run:
    return Run(arm, {**SETTINGS, **settings}, strength, 0)


# -- facts


def test_each_fact_is_of_another_person_and_each_part_has_its_own() -> None:
    found = facts()
    assert len({fact.prompt for fact in found}) == len(found) == PEOPLE
    parts = parts_of(0)
    assert sorted([*parts.forgotten, *parts.retained, *parts.kept]) == list(range(PEOPLE))
    assert sorted([*parts.shown, *parts.hidden]) == sorted(parts.forgotten)
    assert parts_of(1) != parts
    assert parts_of(0).forgotten != parts_of(4).forgotten
    assert sorted(parts_of(0).forgotten) == sorted(parts_of(4).forgotten) == list(range(0, PEOPLE, 4))


def test_likelihoods_equal_the_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text, without padding, with all layers."""
    monkeypatch.setattr(matrix_facts, "KEPT_LAYERS", 1)
    whole, tokenizer = tiny().double(), load_tokenizer(PACKAGED)
    some, expected = facts()[:5], []
    texts = Texts(whole, tokenizer, some)
    for prompt, answer in some:
        start, end = (tokenizer(each)["input_ids"] for each in (prompt, answer))
        with torch.no_grad():
            logits = whole(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        expected.append(float(logits.log_softmax(1)[range(len(end)), end].sum()))
    whole.model.layers = whole.model.layers[1:]
    found = log_likelihoods(whole, texts.batch(range(5)))
    # transformers' RMSNorm computes in float32.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_only_whole_answers_are_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_facts, "KEPT_LAYERS", 1)
    whole, tokenizer = tiny(), load_tokenizer(PACKAGED)
    texts, ids = Texts(whole, tokenizer, facts()[:1] * 3), tokenizer(facts()[0].prompt)["input_ids"]
    with torch.no_grad():
        first = whole(torch.tensor([ids])).logits[0, -1].argmax()
        second = whole(torch.tensor([[*ids, first]])).logits[0, -1].argmax()
        states = whole.model(torch.tensor([[*ids, first]]), output_hidden_states=True).hidden_states[1][0]
    texts.hidden = [states] * 3
    texts.tokens = [torch.tensor(pair) for pair in ([first, second], [first, second + 1], [first + 1, second])]
    whole.model.layers = whole.model.layers[1:]
    assert [recall(whole, texts, [number]) for number in range(3)] == [1, 0, 0]
    assert recall(whole, texts, [0, 1, 2, 0]) == 0.5


# -- unlearning


def test_the_forget_loss_is_npos(knowledge: Knowledge) -> None:
    """By the formula of the paper, with the odds of the two models."""
    net = matrix_facts.with_adapter(knowledge.model, 2, 0)
    for parameter in trained(net):
        nn.init.normal_(parameter, std=0.1)
    batch = knowledge.texts.batch([3, 4])
    with torch.no_grad():
        odds = (log_likelihoods(net, batch) - log_likelihoods(knowledge.model, batch)).exp()
    expected = 2 / 0.5 * (1 + odds**0.5).log().mean()
    torch.testing.assert_close(npo(net, knowledge, [3, 4], 0.5), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arm", [FMLORA, RANDOM])
def test_strength_0_is_plain_lora_and_another_is_not(knowledge: Knowledge, arm: str) -> None:
    plain = unlearned(knowledge, run_of())
    assert same(plain, unlearned(knowledge, run_of(arm, 0.0)))
    assert not same(plain, unlearned(knowledge, run_of(arm, 1.0)))


@pytest.mark.parametrize("arm", [FMLORA, RANDOM])
def test_only_the_forget_loss_is_perturbed(knowledge: Knowledge, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a forget loss, the perturbation changes nothing."""
    forget_loss = matrix_unlearning.npo
    monkeypatch.setattr(matrix_unlearning, "npo", lambda *args: 0 * forget_loss(*args))
    assert same(unlearned(knowledge, run_of()), unlearned(knowledge, run_of(arm, 1.0)))


def test_sign_descent_moves_each_weight_by_the_rate(knowledge: Knowledge) -> None:
    before = matrix_facts.with_adapter(knowledge.model, 2, 0)
    after = unlearned(knowledge, run_of(optimizer="sign", steps=1))
    moved = torch.cat([(one - other).flatten() for one, other in zip(weights(after), weights(before), strict=True)])
    moved = moved[moved != 0]  # A has no gradient while B is 0
    assert len(moved) > 100
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)


def test_averages_lag_behind(knowledge: Knowledge) -> None:
    """Of the start, weighted by 0.9, and the only step."""
    start = matrix_facts.with_adapter(knowledge.model, 2, 0)
    last, average = (unlearned(knowledge, run_of(steps=1, averaging=each)) for each in (0.0, 0.9))
    for first, then, mean in zip(weights(start), weights(last), weights(average), strict=True):
        torch.testing.assert_close(mean, 0.9 * first + 0.1 * then)


def test_an_attack_sees_only_what_it_is_shown(knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, seen = parts_of(0), set()
    batch = Texts.batch

    def noted(self: Texts, numbers: Any) -> Any:
        if torch.is_grad_enabled():
            seen.update(numbers)
        return batch(self, numbers)

    net = unlearned(knowledge, run_of())
    monkeypatch.setattr(Texts, "batch", noted)
    assert attacked(knowledge, net, 0).keys() == {"0", "5", "10", "30"}
    assert seen == set(parts.shown)


def test_an_attack_does_not_start_with_the_unlearners_factor(
    knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    new = matrix_unlearning.with_adapter

    def noted(model: Any, rank: int, seed: int) -> Any:
        net = new(model, rank, seed)
        starts.append(dict(net.named_parameters()))
        return net

    monkeypatch.setattr(matrix_unlearning, "with_adapter", noted)
    attacked(knowledge, unlearned(knowledge, run_of(rank=8, steps=1, rate=0.0)), 0)
    own, its = starts
    factors = [name for name in own if "lora_A" in name]
    assert factors
    assert not any(torch.equal(own[name], its[name]) for name in factors)


# -- the search

Recall = Callable[[Run], float]


def row_of(run: Run, recalled: Recall) -> Row:
    """Utility falls with the rate, and only the highest rate leaves too little of it."""
    utility = 1 - 20 * run.settings["rate"]
    recall = {steps: recalled(run) for steps in ("0", "5", "10", "30")}
    return {**run.key(), "recall": recall, "utility": utility, "rise": 0.1}


def study(recalled: Recall) -> list[Row]:
    """Do the open runs, starting with the last one, until none is left."""
    rows: dict[str, Row] = {}
    while runs := open_runs(list(rows.values()), lambda run: run.name in rows, matrix_b.STAGES):
        assert runs[-1].name not in rows
        for run in [runs[-1], *runs[:-1:2]]:
            rows[run.name] = row_of(run, recalled)
    return list(rows.values())


def smooth(run: Run) -> float:
    """A strength of 4 is best, and a high rate."""
    away = abs(math.log(run.strength / 4)) if run.strength else 1.0
    noise = 0.001 * math.sin((1 + len(run.arm)) * run.seed + 1000 * run.settings["rate"] + run.settings["steps"])
    return 0.5 + 0.1 * away - 100 * run.settings["rate"] + noise


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return study(smooth)


def test_all_settings_differ_and_all_arms_share_them() -> None:
    runs = matrix_b.searched()
    assert len({run.name for run in runs}) == len(runs) == 3 * matrix_b.POINTS
    shared = defaultdict(set)
    for run in runs:
        shared[run.arm].add(json.dumps(run.settings))
    assert shared[LORA] == shared[FMLORA] == shared[RANDOM]


def test_a_choice_keeps_its_utility(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    for arm in (LORA, FMLORA, RANDOM):
        choice = matrix_b.chosen(settings, arm)
        assert choice.utility((0,)) >= 0.95
        assert choice.run.settings["rate"] == 1e-3  # 3e-3 would leave 0.94
    assert matrix_b.chosen(settings, FMLORA).run.strength == 4


def test_grids_are_extended_until_the_best_lies_within(rows: list[Row]) -> None:
    """That of the noise ends at 1."""
    strengths = {row["strength"] for row in rows if row["arm"] == RANDOM}
    assert strengths == {0.03, 0.1, 0.3, 1, 4, 16}
    for beyond in (4, 16):
        runs = [row for row in rows if (row["arm"], row["strength"], row["seed"]) == (RANDOM, beyond, 0)]
        runs = [row for row in runs if row["settings"]["steps"] in SPACE["steps"]]  # those are extended, too
        assert len({json.dumps(row["settings"]) for row in runs}) == len(runs) == 8


def test_rates_and_steps_are_extended_for_every_arm() -> None:
    """The lowest rate and the most steps are best, down to 1e-4 and without an end."""

    def recalled(run: Run) -> float:
        away = abs(math.log(run.settings["rate"] / 1e-4)) + abs(math.log((run.strength or 0.3) / 0.3))
        return 0.1 * away - 0.001 * run.settings["steps"]

    found = study(recalled)
    for arm in matrix_b.STRENGTHS:
        rows = [row for row in found if row["arm"] == arm and row["seed"] == 0 and row["stage"] == "search"]
        assert {row["settings"]["rate"] for row in rows} == {3e-5, 1e-4, 3e-4, 1e-3, 3e-3}
        assert {row["settings"]["steps"] for row in rows} == {25, 50, 100, 200}
        assert matrix_b.chosen(matrix_b.settings_of(found), arm).run.settings["rate"] == 1e-4


def test_final_runs_are_on_fresh_seeds_and_the_table_has_all_arms(rows: list[Row]) -> None:
    finals = [dict(row) for row in rows if row["stage"] == "final"]
    assert {row["seed"] for row in finals} == set(range(100, 120))
    text = matrix_b.table(rows)
    assert all(f"| {arm} |" in text for arm in (LORA, FMLORA, RANDOM))
    cells = matrix_picture.cells_of_b(rows)
    assert [method for _, method in cells] == [FMLORA, RANDOM]
    for arm, found in zip((FMLORA, RANDOM), cells.values(), strict=True):
        assert found is not None
        assert f"| {arm} | {found.mean:+.3f}" in text
    for row in finals:
        row["rise"] = math.nan  # one that has diverged
    assert "| nan ± nan |" in matrix_b.table(finals + [row for row in rows if row["stage"] == "search"])


def test_the_pages_have_the_recalls_and_holms_p_of_all_four(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chosen", "compared"):
        monkeypatch.setattr(matrix_rule, name, lambda *args: None)  # column A has no rows
    first, second, *of_b = matrix_rule.hypotheses([], rows)
    assert first.startswith("| A1: noise on the base, as large as its norm, RandomPerturbation |")
    assert second.endswith("|  | none within the bound |  | 1 |  |")
    settings, finals = matrix_b.settings_of(rows), finals_of(rows)
    found = {arm: matrix_b.compared(settings, finals, arm) for arm in (FMLORA, RANDOM)}
    p_values = [each.p for each in found.values() if each]
    for line, (arm, each), p in zip(of_b, found.items(), holm([1.0, 1.0, *p_values])[2:], strict=True):
        assert each is not None
        assert each.covering is not None
        low, high = each.covering
        assert (
            f"{RELEARNING}, {arm} | {each.means[0]:.2f} | {each.means[1]:.2f} | {each.difference.mean:+.2f} [" in line
        )
        assert line.endswith(f"] | [{low:+.2f}, {high:+.2f}] | {p:.2g} |  |")
    unfinished = [row for row in rows if row["stage"] == "search"]
    unfinished += [{**run.key(), **row_of(run, smooth)} for run in matrix_b.final(rows)]
    assert "]  |  |" not in matrix_rule.hypotheses([], rows)[2]
    assert "] |  |" in matrix_rule.hypotheses([], unfinished)[2]  # intervals that cover the search have no runs


def test_the_rule_takes_the_useful_arm_with_the_lowest_recall(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    line = matrix_rule.rule_of_b(rows)
    assert re.match(rf"\| {RELEARNING} \| RandomPerturbation \| LoRA: 0\.50 recalled \| \S* \(sigma 4\): -0\.10", line)
    monkeypatch.setattr(matrix_rule, "WORTH_B", 0.2)
    assert f"| {RELEARNING} | LoRA |" in matrix_rule.rule_of_b(rows)


def test_an_arm_without_enough_utility_takes_what_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_b, "LEAST_UTILITY", 1.1)
    rows = study(smooth)
    assert matrix_b.chosen(matrix_b.settings_of(rows), FMLORA).run.settings["rate"] == 3e-5
    assert set(matrix_picture.cells_of_b(rows).values()) == {None}
    with pytest.raises(ValueError, match="enough utility"):
        matrix_rule.rule_of_b(rows)


def test_without_a_useful_perturbation_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_b.Setting, "is_useful", lambda self, seeds: self.run.arm == LORA)
    line = matrix_rule.rule_of_b(study(smooth))
    assert re.match(rf"\| {RELEARNING} \| LoRA \| LoRA: -0\.40 recalled \| none with enough utility \|", line)


def test_a_choice_that_loses_its_utility_on_other_seeds_is_the_most_useful(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    for each in matrix_b.ranked(settings, FMLORA)[:8]:
        for seed in (1, 2):
            each.rows[seed] = {**each.rows[seed], "utility": 0.5}
    last = matrix_b.ranked(settings, FMLORA)[7]
    last.rows[2]["utility"] = 0.9
    assert matrix_b.chosen(settings, FMLORA) == last
    assert not last.is_useful(matrix_b.SEARCH_SEEDS)


def test_a_model_that_is_damaged_elsewhere_is_not_useful(rows: list[Row]) -> None:
    settings = matrix_b.settings_of(rows)
    first = matrix_b.chosen(settings, RANDOM)
    first.rows[0] = {**first.rows[0], "rise": 0.8}
    assert not first.is_useful((0,))
    assert first not in matrix_b.ranked(settings, RANDOM)[:8]
    assert matrix_b.chosen(settings, RANDOM, (0,)) != first
    first.rows[0]["rise"] = math.nan
    assert not first.is_useful((0,))


def test_the_command_does_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four settings of each arm, and two final seeds."""
    monkeypatch.setattr(matrix_b, "POINTS", 4)
    monkeypatch.setattr(matrix_b, "FINAL_SEEDS", range(100, 102))
    monkeypatch.setattr(matrix_b, "Knowledge", lambda file: SimpleNamespace(digest="0"))
    done: list[Run] = []

    def perform(run: Run, knowledge: Knowledge) -> Row:
        done.append(run)
        return {**row_of(run, smooth), "value": smooth(run), "taught": knowledge.digest}

    monkeypatch.setattr(matrix_b, "perform", perform)
    matrix_b.main(tmp_path)
    file = tmp_path / "results.jsonl"
    rows = read(file)
    assert {row["stage"] for row in rows} == {"search", "final"}
    assert (tmp_path / "table.md").read_text() == matrix_b.table(rows)

    # Another machine does what is left, and has the same model.
    every, so_far = list(done), tmp_path / "so_far.jsonl"
    done.clear()
    so_far.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-3]))
    matrix_b.main(tmp_path / "other", so_far)
    assert [run.name for run in done] == [run.name for run in every[-3:]]
    assert read(tmp_path / "other" / "results.jsonl") == rows
    monkeypatch.setattr(matrix_b, "Knowledge", lambda file: SimpleNamespace(digest="1"))
    with pytest.raises(ValueError, match="Finished runs had another model"):
        matrix_b.main(tmp_path / "different", so_far)
    with pytest.raises(ValueError, match=r"none\.jsonl has no rows of finished runs"):
        matrix_b.main(tmp_path / "none", tmp_path / "none.jsonl")
