"""Column A of docs/results/protocol_matrix.md: disturbances compared with dense ones, and its runs."""

import copy
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora.full_weight.weight_noise import derived_seed
from recipes.demo.encoder import CutEncoder
from recipes.offline import packaged, texts
from recipes.offline.texts import Example, Source
from recipes.studies.rows import Row

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_a
from matrix_choice import LORA, QAT, STRENGTHS, Run
from matrix_disturbances import (
    B_NOISE,
    BASE_NOISE,
    CLEAN,
    DISTURBANCES,
    DRAWS,
    TEMPERATURES,
    Change,
    Evaluation,
    disturbances,
    linear_weights,
    noisy,
)

TASK = "matrix_test"  # cached in the process, so no other test may use this name
SETTINGS = {"rate": 2e-2, "head_rate": "same", "rank": 2, "dropout": 0.0, "averaging": "none"}


def made_up() -> Iterator[Example]:
    for label, words in enumerate((("heart", "blood", "vein"), ("tooth", "gum", "molar"))):
        for number in range(60):
            text = f"{words[number % 3]} {'and so on ' * (number % 4)}{number}"
            yield Example(text, label, text)


@cache
def encoder(dtype: torch.dtype = torch.float32) -> CutEncoder:
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=72, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).to(dtype)
    return CutEncoder(model, transformers.AutoTokenizer.from_pretrained(packaged.minilm()), 1, length=32)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small task and encoder instead of the study's."""
    monkeypatch.setitem(texts.TASKS, TASK, Source(("heart", "teeth"), made_up))
    given = {"TASK": TASK, "CLASSES": 2, "SHOTS": 4, "BATCH": 4}
    for name, value in given.items():
        monkeypatch.setattr(matrix_a, name, value)
    monkeypatch.setattr(matrix_a, "kept", lambda frozen_layers, length: encoder())
    matrix_a.evaluation.cache_clear()
    yield
    matrix_a.evaluation.cache_clear()


# -- disturbances


def by_hand(weight: Tensor, bits: int) -> Tensor:
    """Round row by row, in groups of 64."""
    result = torch.empty_like(weight)
    for row, start in product(range(len(weight)), range(0, weight.shape[1], 64)):
        group = weight[row, start : start + 64]
        step = group.abs().max() / (2 ** (bits - 1) - 1)
        result[row, start : start + 64] = (group / step).round() * step
    return result


def with_noise(weight: Tensor, size: float, draw: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(draw, zlib.crc32(name.encode())))
    normal = torch.randn(weight.shape, generator=generator).double()
    return weight + size * weight.norm() * normal / normal.norm()


Disturb = Callable[[Any, str, int], None]


def base_noise(size: float) -> Disturb:
    def disturb(layer: Any, name: str, draw: int) -> None:
        weight = layer.base_layer.weight
        weight.data = with_noise(weight.data, size, draw, f"{name}, base")

    return disturb


def b_noise(size: float) -> Disturb:
    def disturb(layer: Any, name: str, draw: int) -> None:
        weight = layer.lora_B["default"].weight
        weight.data = with_noise(weight.data, size, draw, f"{name}, B")

    return disturb


def base_bits(bits: int) -> Disturb:
    def disturb(layer: Any, name: str, draw: int) -> None:
        layer.base_layer.weight.data = by_hand(layer.base_layer.weight.data, bits)

    return disturb


def factor_bits(bits: int) -> Disturb:
    def disturb(layer: Any, name: str, draw: int) -> None:
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight.data = by_hand(factor.weight.data, bits)

    return disturb


BY_HAND = {
    CLEAN: lambda layer, name, draw: None,
    "base, noise 0.3": base_noise(0.3),
    BASE_NOISE: base_noise(1),
    "B, noise 1": b_noise(1),
    B_NOISE: b_noise(3),
    **{f"base, {bits} bits": base_bits(bits) for bits in (4, 3, 2)},
    **{f"A and B, {bits} bits": factor_bits(bits) for bits in (4, 3, 2)},
}


def float64_module(arm: str = LORA, strength: float | None = None) -> Any:
    module = matrix_a.Classifier(encoder(torch.float64), Run(arm, SETTINGS, strength, 0)).double().eval()
    torch.manual_seed(1)
    for layer in lora_layers(module).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return module


def lora_layers(module: Any) -> dict[str, Any]:
    named = module.net.named_modules()
    return {path.removeprefix("base_model.model."): each for path, each in named if hasattr(each, "lora_B")}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_losses_are_those_of_dense_disturbances(disturbance: str, task: None) -> None:
    examples = list(made_up())[:70]  # two batches
    module = float64_module()
    evaluated = Evaluation(encoder(torch.float64), examples)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = evaluated.measure(module.net, module.head, [disturbance])[disturbance]
    losses, rights = [], []
    for draw in range(DRAWS if "noise" in disturbance else 1):
        dense = copy.deepcopy(module)
        for name, layer in lora_layers(dense).items():
            BY_HAND[disturbance](layer, name, draw)
        for batch in evaluated.batches:
            losses.append(dense.loss(batch).item() * len(batch["labels"]))
            rights.append((dense.logits(batch).argmax(1) == batch["labels"]).sum().item())
    texts_in_all = len(losses) / len(evaluated.batches) * len(examples)
    assert len(lora_layers(module)) == 6
    assert found["loss"] == pytest.approx(sum(losses) / texts_in_all, rel=1e-6)
    assert found["accuracy"] == pytest.approx(sum(rights) / texts_in_all)
    assert found["calibrated"] <= found["loss"]
    if disturbance == CLEAN:
        labels = torch.cat([batch["labels"] for batch in evaluated.batches])
        logits = torch.cat([module.logits(batch) for batch in evaluated.batches]).detach()
        at = [F.cross_entropy(logits / temperature, labels).item() for temperature in TEMPERATURES]
        assert found["calibrated"] == pytest.approx(min(at))
    if "noise" in disturbance:
        assert evaluated.measure(module.net, module.head, [disturbance], 1)[disturbance] != found
    # Whatever was measured before, the numbers are equal bit for bit.
    evaluated.measure(module.net, module.head, DISTURBANCES)
    assert evaluated.measure(module.net, module.head, [disturbance])[disturbance] == found
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_noise_has_the_norm_that_it_should_have_and_is_shared() -> None:
    weight, other = torch.randn(2, 30, 50, dtype=torch.float64)
    for size in (0.3, 3.0):
        noise = noisy(weight, size, 0, "query") - weight
        assert noise.norm().item() == pytest.approx(size * weight.norm().item(), rel=1e-6)
        assert (noise / noise.norm()).std().item() == pytest.approx(1500**-0.5, rel=2e-3)
        shared = noisy(other, size, 0, "query") - other
        torch.testing.assert_close(shared / shared.norm(), noise / noise.norm())
    directions = [noisy(weight, 1, draw, name) - weight for draw, name in product(range(DRAWS), ("query", "key"))]
    cosines = torch.nn.functional.normalize(torch.stack(directions).flatten(1))
    assert ((cosines @ cosines.T).fill_diagonal_(0).abs() < 0.15).all()


# -- runs


def test_qat_trains_on_a_rounded_base_and_is_evaluated_on_the_whole_one(task: None) -> None:
    whole = linear_weights(encoder(torch.float64).upper())
    module = float64_module(QAT, 3)
    evaluated = Evaluation(encoder(torch.float64), list(made_up())[:20])
    found = evaluated.measure(module.net, module.head, [CLEAN])
    for name, layer in lora_layers(module).items():
        torch.testing.assert_close(layer.base_layer.weight.data, by_hand(whole[name], 3), rtol=1e-6, atol=0)
        assert torch.equal(evaluated.bases[name], whole[name])
        layer.base_layer.weight.data = whole[name]
    (batch,) = evaluated.batches
    assert found[CLEAN]["loss"] == pytest.approx(module.loss(batch).item(), rel=1e-9)


@pytest.mark.parametrize(("given", "rate"), [("same", 2e-2), (4e-3, 4e-3)])
def test_the_head_has_its_own_rate(given: Any, rate: float, task: None) -> None:
    module = matrix_a.Classifier(encoder(), Run(LORA, {**SETTINGS, "head_rate": given}, None, 0))
    adapter, head = module.new_optimizer().param_groups
    assert (adapter["lr"], head["lr"]) == (2e-2, rate)
    assert [id(each) for each in head["params"]] == [id(each) for each in module.head.parameters()]
    assert len(adapter["params"]) == 12


@pytest.mark.filterwarnings("ignore:Only 3 optimizer steps")
def test_arms_differ_in_their_perturbation_only(task: None) -> None:
    def measured(arm: str, strength: float | None, **more: Any) -> Row:
        run = Run(arm, {**SETTINGS, "dropout": 0.5, **more}, strength, 0)
        found = matrix_a.perform(run, steps=3)["validation"]
        assert tuple(found) == DISTURBANCES
        return dict(found)

    plain = measured(LORA, None)
    assert measured(LORA, None) == plain
    for arm, grid in STRENGTHS.items():
        if grid:
            assert measured(arm, 3) != plain, arm
        if grid and arm != QAT:
            assert measured(arm, 0) == plain, arm
    for more in ({"head_rate": 1e-3}, {"rank": 8}, {"averaging": "0.99"}):
        assert measured(LORA, None, **more) != plain


@pytest.mark.filterwarnings("ignore:Only 3 optimizer steps")
def test_a_final_run_has_its_own_draws_on_test_and_counts_as_a_guess_if_it_diverged(
    task: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def recorded(set_of_draws: int) -> dict[str, list[Change]]:
        drawn.append(set_of_draws)
        return disturbances(set_of_draws)

    monkeypatch.setattr("matrix_disturbances.disturbances", recorded)
    settings = {**SETTINGS, "rate": 1e30, "averaging": "from step 300"}
    row = matrix_a.perform(Run(LORA, settings, None, 100, "final", [CLEAN, B_NOISE]), steps=3)
    assert list(row["test"]) == [CLEAN, B_NOISE]
    assert row["value"] == row["test"][CLEAN]["loss"] == pytest.approx(math.log(2))
    assert "validation" not in row
    assert drawn == [100]
    assert len(matrix_a.evaluation("test").batches[0]["labels"]) == len(texts.parts(TASK)["test"])
