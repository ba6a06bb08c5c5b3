"""What is made of the rows: choices, paired tests, correlations and costs with known answers."""

import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_flatlora.flatness import MeanLoss
from recipes.comparison.plan import choose
from recipes.comparison.plot import plot
from recipes.comparison.run import Row, sam_loss
from recipes.comparison.summary import (
    corrected_p_values,
    holm,
    outcomes,
    sharpness_correlation,
    tuning,
    within_seeds,
)
from recipes.comparison.table import tables

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
    found += [row("lora", {"learning_rate": 2e-3}, s, a, sharpness=1 - a) for s, a in enumerate(LORA)]
    for rho, accuracy in ((0.5, 0.6), (1.0, 0.7), (2.0, 0.8)):
        found += [row("efmlora", {"learning_rate": 2e-3, "rho": rho}, s, accuracy) for s in (100, 101)]
    best = {"learning_rate": 2e-3, "rho": 2.0}
    costs = (0.1, 0.11, 0.12, 0.5, 0.11)
    found += [
        row("efmlora", best, s, a, sharpness=1 - a, processor_seconds_per_step=c)
        for s, (a, c) in enumerate(zip(EFMLORA, costs, strict=True))
    ]
    found += [row("full", {"learning_rate": r}, 100, 0.7 + r) for r in (1e-5, 1e-4, 1e-3)]
    return found + [row("full", {"learning_rate": 1e-3}, s, a, full_sharpness=50 * a) for s, a in enumerate(FULL)]


def by_name(rows: list[Row]) -> dict[str, Any]:
    return {outcome.method: outcome for outcome in outcomes(rows, "toy")}


def test_the_best_mean_accuracy_is_chosen_and_then_the_least_loss() -> None:
    tried = [
        row("efmlora", {"rho": 1.0}, 100, 0.9, loss=3.0),
        row("efmlora", {"rho": 1.0}, 101, 0.5, loss=3.0),
        row("efmlora", {"rho": 2.0}, 100, 0.7, loss=2.0),
        row("efmlora", {"rho": 2.0}, 101, 0.7, loss=2.0),
        row("efmlora", {"rho": 3.0}, 100, 0.6, loss=0.1),
        row("efmlora", {"rho": 3.0}, 101, 0.6, loss=0.1),
    ]
    assert choose(tried) == {"rho": 2.0}
    assert choose(tried[:1] + tried[2:]) == {"rho": 1.0}


def test_means_errors_and_gains(rows: list[Row]) -> None:
    found = by_name(rows)
    assert found["lora"].gain is None
    assert found["lora"].accuracy.mean == pytest.approx(71.4)
    assert found["lora"].accuracy.error == pytest.approx(100 * statistics.stdev(LORA) / math.sqrt(5))
    gains = [100 * (own - other) for own, other in zip(EFMLORA, LORA, strict=True)]
    assert found["efmlora"].gain.mean == pytest.approx(2.2)
    assert found["efmlora"].gain.error == pytest.approx(statistics.stdev(gains) / math.sqrt(5))


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
    one, two = own, own + [{**r, "task": "other"} for r in own]
    p = by_name(own)["efmlora"].p
    assert 0.025 < p < 0.05
    assert "| efmlora | [+2.2 ± 0.7] | +2.20 |" in tables(one)[-1].markdown()
    assert "| efmlora | +2.2 ± 0.7 | +2.2 ± 0.7 | +2.20 |" in tables(two)[-1].markdown()
    found = {task: outcomes(two, task) for task in ("toy", "other")}
    assert set(corrected_p_values(found).values()) == {2 * p}


def test_the_loss_is_compared_seed_by_seed(rows: list[Row]) -> None:
    own = [{**r, "loss": 2.0 + r["seed"] - 0.1 * r["accuracy"] * (r["method"] == "efmlora")} for r in rows]
    found = by_name(own)
    assert found["lora"].excess_loss is None
    assert found["efmlora"].excess_loss.mean == pytest.approx(-0.1 * statistics.mean(EFMLORA))
    assert found["efmlora"].excess_loss.error == pytest.approx(0.1 * statistics.stdev(EFMLORA) / math.sqrt(5))
    told = tables(own)[-2].markdown()
    assert "| lora | 4.000 |  | 1.00 |" in told
    assert "| efmlora | -0.074 ± 0.001 | -0.074 | 1.10 |" in told


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


def test_edges_of_the_grid_are_told(rows: list[Row]) -> None:
    found = by_name(rows)
    assert found["lora"].edge == ""
    assert found["efmlora"].edge == "highest"
    grid = [{"learning_rate": 1.0, "weight_decay": d, "dropout": p} for d, p in product((0.1, 1.0), (0.1, 0.3))]
    two = [row("lora_regularised", config, seed, 0.5) for config, seed in product(grid, (0, 100))]
    assert by_name(two)["lora_regularised"].edge == ""  # all of its four configurations are at some edge


def test_the_cost_is_the_median_of_the_seeds_ratios(rows: list[Row]) -> None:
    assert by_name(rows)["efmlora"].cost == pytest.approx(1.1)
    on_gpu = [{**r, "device": "NVIDIA", "seconds_per_step": 3.0 if r["method"] == "efmlora" else 2.0} for r in rows]
    assert by_name(on_gpu)["efmlora"].cost == pytest.approx(1.5)


def test_the_correlation_is_over_the_runs_that_have_that_sharpness(rows: list[Row]) -> None:
    found = outcomes(rows, "toy")
    assert {deviation.method for deviation in within_seeds(found)} == {"lora", "efmlora"}  # full has another measure
    assert sharpness_correlation(found) > 0.9
    assert math.isnan(sharpness_correlation(found, "expected_sharpness"))
    variant = [{**r, "method": "efmlora_layer", "accuracy": 0.1} for r in rows if r["method"] == "efmlora"]
    assert sharpness_correlation(outcomes(rows + variant, "toy")) == sharpness_correlation(found)


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


def test_sharpness_is_compared_seed_by_seed(rows: list[Row]) -> None:
    own = [{**r, "sharpness": 1.0 + r["seed"]} if r["method"] == "lora" and r["part"] == "test" else r for r in rows]
    ratios = [(1 - accuracy) / (1 + seed) for seed, accuracy in enumerate(EFMLORA)]
    found = by_name(own)
    assert found["efmlora"].sharpness_ratios == pytest.approx(sorted(ratios))
    assert found["full"].sharpness_ratios == []
    low, high = sorted(ratios)[0], sorted(ratios)[-1]
    assert f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})" in tables(own)[0].markdown()


def test_methods_with_fewer_seeds_or_tasks_are_marked(rows: list[Row]) -> None:
    fewer = [r for r in rows if not (r["method"] == "efmlora" and r["part"] == "test" and r["seed"] > 1)]
    other = [{**r, "task": "other"} for r in rows if r["method"] == "lora"]
    of_task, _, _, over_all = (each.markdown() for each in tables(fewer + other))
    assert "toy, 5 seeds" in of_task
    assert "| efmlora (2 seeds) |" in of_task
    assert "| lora | 71.4 ± 1.0 | 71.4 ± 1.0 |  | 1.00 |" in over_all
    assert "| efmlora | +2.5 ± 0.5 |  |  | 1.05 |" in over_all


def test_tables_say_what_was_found(rows: list[Row]) -> None:
    of_task, _, over_all = tables(rows)
    told = of_task.markdown()
    assert "| lora | rate 0.002 | 71.4 ± 1.0 |  |  |" in told
    assert "| efmlora | rho 2 (edge) | 73.6 ± 1.0 | +2.2 ± 0.7 |" in told
    assert "- efmlora: the chosen value is the highest of its grid" in told
    assert "Spearman's rank correlation 0.9" in told
    assert "| efmlora | +2.2 ± 0.7 | +2.20 | 1.10 |" in over_all.markdown()


def test_pictures_are_drawn_of_what_is_there(rows: list[Row], tmp_path: Path) -> None:
    assert [path.name for path in plot(rows, tmp_path)] == ["gain.png", "sharpness.png", "tuning.png", "cost.png"]
    begun = [r for r in rows if r["part"] == "validation"]
    assert [path.name for path in plot(begun, tmp_path)] == ["tuning.png"]


def test_sams_loss_is_at_the_end_of_the_gradient_and_weights_come_back() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    before = weight.detach().clone()
    clean, perturbed = sam_loss(MeanLoss([lambda: weight.square().sum() / 2]), [weight], rho=0.5)
    assert (clean, perturbed) == pytest.approx((12.5, 5.5**2 / 2))
    assert torch.equal(weight, before)
    assert weight.grad is None
