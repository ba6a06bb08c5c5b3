"""The protocol's rules: which trial is chosen, how grids grow, and what is a gain."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evidence_runs import SETTINGS, Fake, work_by_pieces
from scipy import stats

from recipes.evidence.plan import STAGES, Plan
from recipes.evidence.run import Run
from recipes.evidence.search import Grid, arm_of, choose, common_grid, has_diverged
from recipes.evidence.verdict import difference, ends_early, verdict
from recipes.evidence.workloads import LEARNING_RATES, SEARCHES, Config
from recipes.shared.ledger import Row


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


FLAT = by_seed(*[50.0] * 8)


# -- differences and verdicts


def test_a_difference_is_students_interval_of_the_pairs() -> None:
    found = difference(by_seed(51.0, 53.0, 55.0), by_seed(50.0, 50.0, 50.0))
    assert found is not None
    # Differences 1, 3, 5: mean 3, deviation 2, and t of 2 degrees of freedom is 4.3027.
    assert found.low == pytest.approx(3 - 4.3027 * 2 / math.sqrt(3), abs=1e-3)
    assert found.high == pytest.approx(3 + 4.3027 * 2 / math.sqrt(3), abs=1e-3)
    assert found.p == pytest.approx(stats.ttest_rel([51, 53, 55], [50, 50, 50]).pvalue)


def test_seeds_that_one_arm_lacks_do_not_count() -> None:
    found = difference({0: 51.0, 1: 52.0, 2: 99.0}, {0: 50.0, 1: 50.0, 7: 10.0})
    assert found is not None
    assert found.estimate.values == 2
    assert found.estimate.mean == 1.5
    assert difference({0: 1.0}, {0: 0.0}) is None


GAIN = by_seed(52.0, 53.0, 52.5, 52.0, 53.0, 52.5, 52.0, 53.0)  # about 2.5 points over FLAT
SMALL = by_seed(50.1, 50.2, 50.3, 50.1, 50.2, 50.3, 50.1, 50.2)
FAR_BELOW = by_seed(*[20.0] * 8)


@pytest.mark.parametrize(
    ("candidate", "competitors", "kind", "reason"),
    [
        (GAIN, {"early": FLAT, "smooth": by_seed(*[51.0] * 8)}, "gain", ""),
        (GAIN, {"early": FLAT, "smooth": by_seed(*[52.2] * 8)}, "no gain", "smooth"),  # as good
        # Its interval contains 0, with 50.5 on average.
        (GAIN, {"early": by_seed(40.0, 60.0, 45.0, 57.0, 41.0, 61.0, 44.0, 56.0)}, "no gain", "early"),
        (SMALL, {"early": FLAT}, "no gain", ""),  # less than half a point
        (by_seed(45.0, 56.0, 49.0, 55.0, 46.0, 58.0, 47.0, 56.0), {"early": FAR_BELOW}, "undecided", "seeds"),
        # Neither for a gain nor against it, as long as seeds of a competitor are missing.
        (GAIN, {"early": {}}, "no verdict yet", ""),
        (GAIN, {"early": by_seed(*[51.0] * 7)}, "no verdict yet", ""),
        (GAIN, {"early": by_seed(*[53.0] * 7)}, "no verdict yet", ""),
    ],
)
def test_verdicts(candidate: dict[int, float], competitors: dict[str, Any], kind: str, reason: str) -> None:
    found = verdict(candidate, FLAT, competitors)
    assert found is not None
    assert found.kind == kind
    assert reason in found.reason
    assert verdict({}, FLAT, competitors) is None


def test_an_interval_above_0_is_undecided_while_holms_p_is_not() -> None:
    # Differences of mean 2 and error about 0.75: p is 0.03, and three times that is above 0.05.
    barely = by_seed(52.0, 54.0, 49.5, 54.5, 51.5, 54.0, 49.5, 51.0)
    found = verdict(barely, FLAT, {"early": FAR_BELOW})
    assert found is not None
    assert found.baseline.low > 0
    assert found.baseline.p is not None
    assert 0.05 / 3 < found.baseline.p < 0.05
    assert found.kind == "undecided"


def test_a_workload_ends_early_after_eight_seeds_below_half_a_point() -> None:
    assert ends_early(FLAT, SMALL)
    assert not ends_early(FLAT, GAIN)
    assert not ends_early(FLAT, {seed: value for seed, value in SMALL.items() if seed < 7})
    # Later seeds do not change what was decided after the first eight.
    assert ends_early({**FLAT, 8: 0.0, 9: 0.0}, {**SMALL, 8: 99.0, 9: 50.0})


# -- searches


def test_every_method_has_twenty_trials_and_as_many_after_an_extension() -> None:
    assert {len(Grid().trials(method)) for method in SEARCHES} == {20}
    assert {len(Grid(1, 1, 1).trials(method)) for method in SEARCHES} == {35}
    assert Grid(1, 1, 0).learning_rates == [2.5e-4, *LEARNING_RATES, 1.6e-2]
    assert Grid(further=1).settings("efmlora") == [{}, {"rho": 0.5}, {"rho": 2.0}, {"rho": 8.0}, {"rho": 32.0}]


def test_at_size_0_every_method_is_lora() -> None:
    for method in SEARCHES:
        assert arm_of(method, {"learning_rate": 1e-3}) == "lora"
        assert arm_of(method, Grid().trials(method)[len(LEARNING_RATES)]) == method


def row(loss: float | None, accuracy: float = 0.5) -> dict[str, Any]:
    return {"validation_loss": loss, "validation_accuracy": accuracy}


def test_a_trial_with_a_failed_run_is_never_chosen() -> None:
    failed, high = {"learning_rate": 1.0}, {"learning_rate": 2.0}
    assert choose([(failed, [row(0.1), row(None), row(0.1)]), (high, [row(3.0)] * 3)]) == high


def test_accuracy_decides_between_equal_losses_alone() -> None:
    trials: list[tuple[Config, Sequence[Any]]] = [({"rho": 1.0}, [row(1.0, 0.4)]), ({"rho": 2.0}, [row(1.0, 0.6)])]
    assert choose(trials) == {"rho": 2.0}
    assert choose([*trials, ({"rho": 3.0}, [row(0.9, 0.1)])]) == {"rho": 3.0}


def test_a_choice_at_an_end_extends_the_grid_of_all_until_it_is_not() -> None:
    best = {"lora": {"learning_rate": 1e-3}, "efmlora": {"learning_rate": 1.6e-2, "rho": 32.0}}

    def chosen(method: str, grid: Grid) -> Config | None:
        """The trial nearest to the best."""
        if method not in best:
            return None  # its search is not finished
        rate = min(grid.learning_rates, key=lambda one: abs(one - best[method]["learning_rate"]))
        if method == "lora":
            return {"learning_rate": rate}
        sizes = [setting.get("rho", 0.0) for setting in grid.settings(method)]
        return {"learning_rate": rate, "rho": min(sizes, key=lambda one: abs(one - best[method]["rho"]))}

    grid = common_grid(chosen)
    assert grid == Grid(lower_rates=0, higher_rates=2, further=2)  # one value beyond the best


def test_sizes_end_where_training_diverges_at_every_rate() -> None:
    def diverges(config: Config) -> bool:
        return config.get("rho", 0) >= 8 and (config["rho"] > 8 or config["learning_rate"] > 5e-4)

    sizes = [config.get("rho", 0) for config in Grid(further=3).trials("efmlora", diverges)]
    assert dict.fromkeys(sizes, 5) == {size: sizes.count(size) for size in (0, 0.5, 2, 8, 32)}
    assert has_diverged([{"chance": 0.1, **row(2.25)}, {"chance": 0.1, **row(None)}])
    assert not has_diverged([{"chance": 0.1, **row(2.25)}, {"chance": 0.1, **row(2.29)}])


class Dropped(Fake):
    """Dropout of 0.5 is best, and from rho 8 on nothing is learned."""

    def __call__(self, run: Run, folder: Path | None = None) -> Row:
        row = super().__call__(run, folder)
        of_dropout = 0.01 * abs(run.config.get("dropout", 0) - 0.5)
        row["validation_loss"] += of_dropout + 0.1 * (run.config.get("rho", 0) >= 8)
        return row


def test_a_search_is_finished_where_training_has_diverged(tmp_path: Path) -> None:
    """LoRA's choice at the end of its grid extends all, and EFMLoRA's largest rho of the first is not exceeded."""
    plan = Plan(tmp_path, "tiny", SETTINGS, ["lora", "efmlora"], STAGES, range(1))
    work_by_pieces(plan, Dropped(gain=0.0), lambda run: None)
    grid = common_grid(plan.chosen)
    assert grid == Grid(further=2)
    assert plan.chosen("lora", grid) == {"learning_rate": 2e-3, "dropout": 0.5}
    assert {row["config"].get("rho", 0) for row in plan.ledger.rows if row["arm"] == "efmlora"} == {0.5, 2.0, 8.0}
