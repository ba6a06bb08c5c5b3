"""An audit of column A in protocol_matrix.md: LoRA and EFMLoRA with lower learning rates.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/matrix_rates.py FOLDER``. When all runs are
done, the rows are in ``FOLDER/results.jsonl`` and the table is in ``FOLDER/table.md``. The same command resumes, and
several processes may share the runs. It needs the rows of column A, ``matrix_a.jsonl``.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matrix_a
from matrix_choice import (  # in this folder
    BEST,
    DISTURBED,
    EFMLORA,
    LORA,
    POINTS,
    SEARCH_SEEDS,
    SPACE,
    Run,
    chosen,
    judged,
    on_first_seed,
    points,
    ranked,
    settings_of,
)
from matrix_disturbances import CLEAN
from matrix_table import difference, finals_of, on_test, short
from shared_runs import queue_of, work_in_stages

from recipes.command_line.progress import quiet
from recipes.demo.training import on_one_thread
from recipes.studies.rows import Row, read
from recipes.studies.statistics import estimate, with_error, with_interval
from recipes.studies.tables import markdown

LOWER = {LORA: "LoRA, lower rates", EFMLORA: "EFMLoRA, lower rates"}
STRENGTHS: dict[str, list[float]] = {LOWER[LORA]: [], LOWER[EFMLORA]: [0.5, 2, 8, 32]}
RATES: dict[str, list[Any]] = {
    **SPACE,
    "rate": [1.5e-5, 3e-5, 6e-5, 1.2e-4, 2.5e-4],
    "head_rate": [2.5e-4, 5e-4, 1e-3],
}
HYPERCUBE = 1


def rows_of_a() -> list[Row]:
    """Return column A's rows, which give the bound on the clean loss and the other arms' results."""
    return read(Path(__file__).parent / "matrix_a.jsonl")


def searched() -> list[Run]:
    """Return the runs of all settings on the first seed, LoRA's first."""
    runs = on_first_seed(Run, points(RATES, POINTS, HYPERCUBE), STRENGTHS)
    return sorted(runs, key=lambda run: list(STRENGTHS).index(run.arm))


def repeated(rows: Sequence[Row]) -> list[Run]:
    """Return the runs of the best eight settings on the other search seeds."""
    settings = settings_of([*rows_of_a(), *rows])
    runs: dict[str, Run] = {}
    for arm, disturbance in product(STRENGTHS, DISTURBED):
        for setting, seed in product(ranked(settings, arm, disturbance)[:BEST], SEARCH_SEEDS[1:]):
            run = setting.run._replace(seed=seed)
            runs[run.name] = run
    return list(runs.values())


def final(rows: Sequence[Row]) -> list[Run]:
    """Return the final runs, seed by seed, each under the disturbances for which its setting is chosen."""
    settings = settings_of([*rows_of_a(), *rows])
    return judged(
        (chosen(settings, arm, disturbance), disturbance) for arm, disturbance in product(STRENGTHS, DISTURBED)
    )


STAGES = (lambda rows: searched(), repeated, final)


def perform(run: Run) -> Row:
    """Train and evaluate as in column A."""
    (method,) = (each for each, name in LOWER.items() if name == run.arm)
    return matrix_a.perform(run._replace(arm=method))


def table(rows: Sequence[Row]) -> str:
    """Return the choices' test losses, and their differences to those of other arms; every run must be there."""
    every = [*rows_of_a(), *rows]
    settings, finals = settings_of(every), finals_of(every)
    head = ["disturbance", "arm", "strength; rate, head's, rank, dropout, averaging", "test loss", "clean loss"]
    lines = [[*head, *(f"minus {arm}'s" for arm in (*LOWER, LOWER[LORA]))]]
    for disturbance, arm in product(DISTURBED, STRENGTHS):
        choice = chosen(settings, arm, disturbance)
        if choice is None:
            lines.append([disturbance, arm, "none within the bound", *[""] * 5])
            continue
        losses = [with_error(estimate(on_test(finals, choice, each)), ".3f") for each in (disturbance, CLEAN)]
        cells = [disturbance, arm, short(choice), *losses]
        for other in (*LOWER, LOWER[LORA]):
            its = chosen(settings, other, disturbance)
            if its is None or other == arm:
                cells.append("")
            else:
                cells.append(with_interval(difference(finals, choice, its, disturbance), 3))
        lines.append(cells)
    return f"{markdown(lines)}\n"


def main(folder: Path) -> None:
    """Do all runs, and write the rows and the table."""
    queue = queue_of(folder, "matrix_rates", Run, {"rates": RATES, "strengths": STRENGTHS})
    work_in_stages(queue, STAGES, perform, folder, table)


if __name__ == "__main__":
    quiet()
    on_one_thread()
    main(Path(sys.argv[1]))
