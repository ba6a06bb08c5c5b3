"""What early ends would have saved in P1's search (protocol_p1_p2.md), whose trials were all trained to their end.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/p1_curves.py FOLDER ROWS``. The trials of P1
with the first seed are trained again, since P1's rows lack the metric after each validation. Rows that are there are
kept. At the end it prints which trials would have ended early, and what that would have changed. The rule is Optuna's
median pruner's, on each side alone, with the trials of earlier rounds of four to compare with.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from p2 import OPTIONS, RECIPE, measure_all, runs_of_p1  # beside this file

from recipes.studies.process import fit
from recipes.studies.rows import Row, read
from recipes.tune.search import ROUND, SEARCH_SEEDS, SIDES, Run
from recipes.tune.space import RHO, arguments

REPEATED = 4  # trials of a side that P1 ran with all seeds


def curve_of(run: Run, folder: Path) -> Row:
    """Return the metric after each validation, and the seconds of training."""
    given = [*OPTIONS, *arguments(run.config), f"--rho={run.config[RHO]}"]
    fitted = fit(RECIPE, folder / run.name, [*given, f"--seed_everything={run.seed}", f"--data.seed={run.seed}"])
    for file in (folder / run.name).glob("fit/checkpoints/*.ckpt"):
        file.unlink()
    return {"curve": [each["val_loss"] for each in fitted["validations"]], "seconds": fitted["training_seconds"]}


def ended_after(rows: Sequence[Row]) -> dict[int, int]:
    """Return the trials of a side that would end early, each with the number of its validations."""
    found = {}
    for row in rows:
        round_of = row["trial"] // ROUND
        # A trial that ended early leaves a short curve.
        others = [other["curve"][: found.get(other["trial"])] for other in rows if other["trial"] // ROUND < round_of]
        for number in range(1, len(row["curve"])):  # after the last validation there is nothing to save
            then = [other[number - 1] for other in others if len(other) >= number]
            if then and min(row["curve"][:number]) > median(then):
                found[row["trial"]] = number
                break
    return found


def report(rows: Sequence[Row]) -> str:
    """Say what would have ended early, and whether the best trials would have been the same."""
    lines, saved, seconds = [], 0.0, sum(row["seconds"] for row in rows)
    for side in SIDES:
        own = sorted((row for row in rows if row["side"] == side), key=lambda row: row["trial"])
        ended = ended_after(own)
        best = sorted(own, key=lambda row: min(row["curve"]))[:REPEATED]
        lost = [row["trial"] for row in best if row["trial"] in ended]
        for row in own:
            number = ended.get(row["trial"], len(row["curve"]))
            saved += row["seconds"] * (1 - number / len(row["curve"]))
        lines.append(f"{side}: trials {sorted(ended)} would have ended early")
        lines.append(
            f"{side}: best trials {[row['trial'] for row in best]}, of which {lost or 'none'} would have ended"
        )
    lines.append(f"saved: {saved / 60:.0f} of {seconds / 60:.0f} minutes")
    return "\n".join(lines)


def main(folder: Path, path: Path) -> None:
    """Train what is missing, and print the report."""
    runs = [run for run in runs_of_p1() if run.stage == "search" and run.seed == SEARCH_SEEDS[0]]
    runs.sort(key=lambda run: (run.trial, run.side))
    measure_all(runs, lambda run: curve_of(run, folder), path)
    print(report(read(path)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
