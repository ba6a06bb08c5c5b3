"""Column B of docs/results/protocol_matrix.md: facts, unlearning and the attack."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from recipes.language.model import PACKAGED, load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_facts
import matrix_unlearning
from matrix_facts import PEOPLE, Knowledge, Known, Texts, facts, known, log_likelihoods, trained
from matrix_unlearning import FMLORA, LORA, RANDOM, Run, attacked, npo, parts_of, unlearned

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
        patch.setattr(matrix_facts, "known", lambda *args: Known(next(recalled), 0.0))
        found, second = Knowledge(file), Knowledge(file)  # the second one reads the file
        patch.setattr(matrix_facts, "known", lambda *args: Known(0.9, 0.0))
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
    assert [known(whole, texts, [number]).recall for number in range(3)] == [1, 0, 0]
    assert known(whole, texts, [0, 1, 2, 0]).recall == 0.5
    expected = log_likelihoods(whole, texts.batch([0, 1, 2, 0])).mean().item()
    assert known(whole, texts, [0, 1, 2, 0]).likelihood == pytest.approx(expected)


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

    model = unlearned(knowledge, run_of()).merge_and_unload()
    before = known(model, knowledge.texts, parts.hidden)
    monkeypatch.setattr(Texts, "batch", noted)
    found = attacked(knowledge, model, 0)
    assert found["recall"].keys() == found["likelihood"].keys() == {"0", "5", "10", "30"}
    assert seen == set(parts.shown)
    assert (found["recall"]["0"], found["likelihood"]["0"]) == before == known(model, knowledge.texts, parts.hidden)
    # The model stays as it is, so that it can be attacked again.
    assert attacked(knowledge, model, 0) == found
    assert attacked(knowledge, model, 0, 1e-4)["likelihood"]["30"] != found["likelihood"]["30"]


def test_an_attack_tells_what_is_hidden_from_what_is_shown(
    knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shown = unlearned(knowledge, run_of()).merge_and_unload(), parts_of(0).shown
    monkeypatch.setattr(matrix_unlearning, "known", lambda net, texts, numbers: Known(float(numbers == shown), 0.0))
    found = attacked(knowledge, model, 0)
    assert (set(found["recall"].values()), found["shown"]) == ({0.0}, 1.0)


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
    attacked(knowledge, unlearned(knowledge, run_of(rank=8, steps=1, rate=0.0)).merge_and_unload(), 0)
    own, its = starts
    factors = [name for name in own if "lora_A" in name]
    assert factors
    assert not any(torch.equal(own[name], its[name]) for name in factors)
