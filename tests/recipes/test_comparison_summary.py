"""What is made of the rows: choices, paired tests, correlations and costs with known answers."""

import math
import statistics
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_flatlora.flatness import MeanLoss
from recipes.comparison.run import Row, sam_loss
from recipes.comparison.summary import (
    corrected_p_values,
    holm,
    outcomes,
    sharpness_correlation,
    tuning,
    within_seeds,
)

LORA = (0.70, 0.72, 0.71, 0.75, 0.69)
EFMLORA = (0.73, 0.74, 0.71, 0.77, 0.73)
FULL = (0.71, 0.71, 0.72, 0.74, 0.70)


def row(method: str, config: dict[str, float], seed: int, accuracy: float, **more: Any) -> Row:
    part = "validation" if seed >= 100 else "test"
    shown = {"task": "toy", "method": method, "config": config, "seed": seed, "part": part, "accuracy": accuracy}
    cost = {"processor_seconds_per_step": 0.1, "seconds_per_step": 9.0, "device": "x86_64 CPU", "loss": 1.0}
    return {**shown, "settings": {"sharpness_rho": 1.0, "precision": "32-true"}, **cost, **more}


@pytest.fixture
def rows() -> list[Row]:
    rates = {1e-3: 0.6, 2e-3: 0.7, 4e-3: 0.65}
    found = [row("lora", {"learning_rate": r}, s, a) for (r, a), s in product(rates.items(), (100, 101))]
    found += [row("lora", {"learning_rate": 2e-3}, s, a) for s, a in enumerate(LORA)]
    for rho, accuracy in ((0.5, 0.6), (1.0, 0.7), (2.0, 0.8)):
        found += [row("efmlora", {"learning_rate": 2e-3, "rho": rho}, s, accuracy) for s in (100, 101)]
    found += [row("efmlora", {"learning_rate": 2e-3, "rho": 2.0}, s, a) for s, a in enumerate(EFMLORA)]
    found += [row("full", {"learning_rate": r}, 100, 0.7 + r) for r in (1e-5, 1e-4, 1e-3)]
    return found + [row("full", {"learning_rate": 1e-3}, s, a) for s, a in enumerate(FULL)]


def by_name(rows: list[Row]) -> dict[str, Any]:
    return {outcome.method: outcome for outcome in outcomes(rows, "toy")}


def test_the_paired_test_is_students_with_holms_correction(rows: list[Row]) -> None:
    found = by_name(rows)

    def p(own: tuple[float, ...]) -> float:
        differences = [a - b for a, b in zip(own, LORA, strict=True)]
        t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(5))
        return float(2 * stats.t.sf(abs(t), df=4))

    first, second = p(EFMLORA), p(FULL)
    assert first < second
    assert [found[name].p for name in ("efmlora", "full")] == pytest.approx([first, second])
    assert found["efmlora"].p_holm == pytest.approx(2 * first)
    assert found["full"].p_holm == pytest.approx(max(second, 2 * first))
    unpaired = stats.ttest_ind(EFMLORA, LORA).pvalue
    assert abs(unpaired - first) > 0.05  # the pairing matters here


def test_holm_is_what_scipy_would_reject() -> None:
    corrected = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_variants_are_a_family_of_tests_of_their_own(rows: list[Row]) -> None:
    variants = []
    for name in ("efmlora_layer", "fmlora_every5"):
        variants += [{**r, "method": name} for r in rows if r["method"] == "efmlora"]
    before, after = by_name(rows), by_name(rows + variants)
    assert after["efmlora"].p_holm == before["efmlora"].p_holm == after["efmlora_layer"].p_holm


def test_the_table_over_all_tasks_corrects_for_all_its_tests(rows: list[Row]) -> None:
    own = [r for r in rows if r["method"] != "full"]
    two = own + [{**r, "task": "other"} for r in own]
    found = {task: outcomes(two, task) for task in ("toy", "other")}
    assert set(corrected_p_values(found).values()) == {2 * by_name(own)["efmlora"].p}


def test_seeds_that_one_method_lacks_are_left_out_of_the_comparison(rows: list[Row]) -> None:
    fewer = [r for r in rows if not (r["method"] == "efmlora" and r["part"] == "test" and r["seed"] > 1)]
    outcome = by_name(fewer)["efmlora"]
    assert outcome.gain.mean == pytest.approx(2.5)
    one = [r for r in fewer if not (r["method"] == "efmlora" and r["seed"] == 1)]
    outcome = by_name(one)["efmlora"]
    assert outcome.p is None
    assert math.isnan(outcome.gain.error)


def test_equal_gains_with_all_seeds_have_no_spread_to_test_with(rows: list[Row]) -> None:
    shifted = [{**r, "method": "full", "accuracy": r["accuracy"] + 0.001} for r in rows if r["method"] == "lora"]
    outcome = by_name([r for r in rows if r["method"] == "lora"] + shifted)["full"]
    assert outcome.gain.mean == pytest.approx(0.1)
    assert outcome.p is None


def test_a_method_tuned_again_at_a_new_learning_rate_is_compared_with_that_one(rows: list[Row]) -> None:
    rate = 4e-3  # LoRA's grid was extended, and the methods that take its rate over are tuned again, worse than before
    own = [row("lora", {"learning_rate": rate}, s, 0.9) for s in (100, 101)]
    own += [row("lora", {"learning_rate": rate}, s, a) for s, a in enumerate(LORA)]
    own += [row("efmlora", {"learning_rate": rate, "rho": r}, s, 0.3 * r) for r, s in product((0.5, 1.0), (100, 101))]
    own += [row("efmlora", {"learning_rate": rate, "rho": 1.0}, s, a) for s, a in enumerate(EFMLORA)]
    found = by_name(rows + own)
    assert found["lora"].config == {"learning_rate": rate}
    assert found["efmlora"].config == {"learning_rate": rate, "rho": 1.0}
    assert found["efmlora"].edge == "highest"
    assert [config["learning_rate"] for config, _ in tuning(rows + own, "efmlora")] == [rate, rate]


def test_what_the_seeds_do_to_sharpness_and_error_is_no_correlation(rows: list[Row]) -> None:
    """A seed with hard examples is sharp and bad with every method; between methods it is the other way round."""
    own = []
    for r in rows:
        if r["part"] == "test" and r["method"] != "full":
            is_lora = r["method"] == "lora"
            accuracy = 0.9 - 0.1 * r["seed"] + 0.01 * is_lora
            own.append({**r, "sharpness": (1 + r["seed"]) * (1 + is_lora), "accuracy": accuracy})
    raw = stats.spearmanr([r["sharpness"] for r in own], [1 - r["accuracy"] for r in own])
    assert raw.statistic > 0.5
    assert sharpness_correlation(outcomes(own, "toy")) < -0.8
    errors = {deviation.method: deviation.error for deviation in within_seeds(outcomes(own, "toy"))}
    assert errors == pytest.approx({"lora": -0.5, "efmlora": 0.5})


def test_sams_loss_is_at_the_end_of_the_gradient_and_weights_come_back() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    before = weight.detach().clone()
    clean, perturbed = sam_loss(MeanLoss([lambda: weight.square().sum() / 2]), [weight], rho=0.5)
    assert (clean, perturbed) == pytest.approx((12.5, 5.5**2 / 2))
    assert torch.equal(weight, before)
    assert weight.grad is None
