"""The rule that docs/results/matrix_rule.py takes from column A, on made-up rows."""

import re
import sys
from pathlib import Path

import pytest

from recipes.studies.rows import Row
from recipes.studies.statistics import Estimate

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_choice as choice
import matrix_rule
import matrix_table
from matrix_choice import EFMLORA, FINAL_SEEDS, FMLORA, LORA, QAT, RANDOM, Run
from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN

# The mean losses under noise, on validation and on test; the other arms have 3.
ON_BASE = {LORA: (2.0, 2.0), QAT: (1.9, 1.8), RANDOM: (1.5, 1.6), EFMLORA: (1.6, 1.0)}
ON_B = {LORA: (2.0, 2.0), QAT: (1.9, 2.0), EFMLORA: (1.8, 2.1)}


def losses(run: Run, disturbance: str) -> float:
    """FMLoRA is too bad on clean data; EFMLoRA's grid has its best within."""
    if disturbance == CLEAN:
        return 9.0 if run.arm == FMLORA else 1.0
    means = {BASE_NOISE: ON_BASE, B_NOISE: ON_B}.get(disturbance, {}).get(run.arm, (3.0, 3.0))
    return means[run.stage == "final"] + 0.01 * (run.seed % 3 - 1) * (len(run.arm) - 4)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    runs = [run for run in choice.searched() if run.strength in (None, *choice.STRENGTHS[run.arm][1:2])]
    runs += [run._replace(seed=seed) for run in runs for seed in (1, 2)]
    searched = [row_of(run, "validation") for run in runs]
    return searched + [row_of(run, "test") for run in choice.final(searched)]


def row_of(run: Run, part: str) -> Row:
    return {**run.key(), part: {name: {"loss": losses(run, name)} for name in run.disturbances}}


def test_validation_chooses_both_sides(rows: list[Row]) -> None:
    """On test EFMLoRA is the better perturbation."""
    found = matrix_rule.verdict(choice.settings_of(rows), matrix_table.finals_of(rows), BASE_NOISE)
    assert found.best is not None
    assert found.found is not None
    assert (found.rival.run.arm, found.best.run.arm, found.use) == (QAT, RANDOM, RANDOM)
    by_seed = [0.01 * (seed % 3 - 1) * (len(RANDOM) - len(QAT)) - 0.2 for seed in FINAL_SEEDS]
    assert found.found.mean == pytest.approx(sum(by_seed) / len(by_seed))


def test_a_perturbation_that_is_not_surely_better_is_not_used(rows: list[Row]) -> None:
    found = matrix_rule.verdict(choice.settings_of(rows), matrix_table.finals_of(rows), B_NOISE)
    assert found.best is not None
    # QAT-LoRA, which validation prefers, isn't surely better than LoRA on test either.
    assert (found.rival.run.arm, found.best.run.arm, found.use) == (LORA, EFMLORA, LORA)


def test_a_perturbation_that_gains_little_is_not_used(rows: list[Row]) -> None:
    found = matrix_rule.verdict(choice.settings_of(rows), matrix_table.finals_of(rows), BASE_NOISE)
    assert found._replace(found=Estimate(-0.03, 0.001, 20)).use == RANDOM
    assert found._replace(found=Estimate(-0.01, 0.001, 20)).use == QAT
    assert found._replace(found=Estimate(-0.03, 0.02, 20)).use == QAT


def test_the_lines_have_the_losses(rows: list[Row]) -> None:
    *lines, sentence = matrix_rule.rule(rows)
    assert len(lines) == len(matrix_rule.TITLES)
    assert sentence == "Milder disturbances, and rounding the adapter, cost at most 2.00 nats"
    (of_base,) = [line for line in lines if matrix_rule.TITLES[BASE_NOISE] in line]
    shown = re.fullmatch(
        r"\| noise on the base, as large as its norm \| (.*) \| (.*): (.*) \| (.*): (.*) \[(.*)\] \|", of_base
    )
    assert shown is not None
    assert shown[1] == RANDOM
    assert shown[2] == "QAT-LoRA (bits 3)"
    assert float(shown[3]) == pytest.approx(0.8, abs=0.06)
    assert shown[4] == "RandomPerturbation (sigma 0.3)"
    first, second = matrix_rule.hypotheses(rows, [])
    assert first.startswith(f"| A1: noise on the base, as large as its norm, RandomPerturbation | {2:.2f} | ")
    assert second.startswith("| A2: noise on B, three times its norm, EFMLoRA | 2.00 | 2.1")


def test_p_is_the_highest_that_column_b_allows(rows: list[Row]) -> None:
    found = matrix_table.compared(choice.settings_of(rows), matrix_table.finals_of(rows), EFMLORA, B_NOISE)
    assert found is not None
    p = float(matrix_rule.hypotheses(rows, [])[1].split("|")[-3])
    assert p == pytest.approx(min(1, 3 * found.p), rel=0.1)


def test_without_a_fair_setting_nothing_is_compared(rows: list[Row]) -> None:
    kept = [row for row in rows if row["arm"] in (LORA, FMLORA)]
    settings, finals = choice.settings_of(kept), matrix_table.finals_of(kept)
    found = matrix_rule.verdict(settings, finals, BASE_NOISE)
    assert (found.best, found.found, found.use) == (None, None, LORA)
    assert all(line.endswith("| none within the bound |") for line in matrix_rule.rule(kept)[:-1])
    assert matrix_table.compared(settings, finals, EFMLORA, B_NOISE) is None
    assert all(line.endswith("| 1 |  |") for line in matrix_rule.hypotheses(kept, []))
