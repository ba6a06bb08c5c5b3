"""Kept adapters judged once more: what each condition does, against dense references, and the command."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_runs import RUN, tiny_encoder

from recipes.evidence.conditions import AS_TRAINED, CONDITIONS, rounded, with_typos
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.robustness import Kept, judge
from recipes.evidence.run import perform

QUERY = "net.base_model.model.layer.0.attention.self.query"


pytestmark = pytest.mark.usefixtures("evidence")


@pytest.fixture
def module() -> ShotsClassifier:
    """With an adapter that does something."""
    module = ShotsClassifier(tiny_encoder(), 3, RUN.settings, RUN.config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def weights(module: ShotsClassifier) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module: ShotsClassifier, condition: str) -> list[str]:
    """Apply a condition; the names of the parameters that it has changed."""
    before = weights(module)
    change = CONDITIONS[condition].change
    assert change is not None
    change(module)
    return [name for name, weight in weights(module).items() if not torch.equal(weight, before[name])]


# -- rounding and scaling


def test_merged_weights_are_rounded_as_a_dense_matrix(module: ShotsClassifier) -> None:
    layer: Any = module.get_submodule(QUERY)
    base, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = rounded((base + 2.0 * B @ A).detach(), 4)
    names = changed(module, "merged_4_bits")
    assert names == [f"{QUERY}.base_layer.weight", f"{QUERY.replace('query', 'value')}.base_layer.weight"]
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=0, atol=1e-6)
    # What the layer computes is the rounded matrix, without the adapter once more.
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(inputs), inputs @ expected.T + layer.base_layer.bias, rtol=0, atol=1e-5)


# -- typos


def test_typos_drop_letters_or_swap_them_with_the_next() -> None:
    text = "Which nerve supplies the lens, in 40 % of patients? " * 200
    letters = sum(map(str.isalpha, text))
    typed = with_typos(text, 0.1)
    dropped = Counter(text)
    dropped.subtract(typed)
    assert all(count >= 0 and (count == 0 or letter.isalpha()) for letter, count in dropped.items())
    assert 0.05 < dropped.total() / letters < 0.08  # half of those that are hit, and others that end a word
    assert typed == with_typos(text, 0.1) != with_typos(text, 0.05)
    assert with_typos(text, 0.0) == text
    # Swapped, or both dropped: "b" has no letter behind it, and digits are no letters.
    assert {with_typos(f"ab{number}", 1.0).removesuffix(str(number)) for number in range(50)} == {"ba", ""}


# -- a kept adapter


def test_as_trained_gives_the_figures_of_the_run(tmp_path: Path) -> None:
    row = perform(RUN, tmp_path)
    judged = judge(Kept(RUN, row["weights"]), tmp_path)
    as_trained = judged["conditions"][AS_TRAINED]
    for name in ("accuracy", "loss", "ece", "brier", "loss_scaled", "ece_scaled", "brier_scaled"):
        # Held to AVX2, the two float32 losses of the same weights differed by 4e-10.
        assert as_trained[name] == pytest.approx(row[f"test_{name}"], rel=1e-6)
    assert as_trained["temperature"] == pytest.approx(row["temperature"], rel=1e-6)
    assert list(judged["conditions"]) == list(CONDITIONS)
    losses = [scores["loss"] for scores in judged["conditions"].values()]
    assert len(set(losses)) == len(CONDITIONS) == 12
    # Typos change the texts and not the weights, so that the temperature is the same.
    assert judged["conditions"]["typos_0.1"]["temperature"] == row["temperature"]
    assert judged["conditions"]["merged_4_bits"]["temperature"] != row["temperature"]
