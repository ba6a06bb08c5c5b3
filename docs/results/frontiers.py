"""Draws ``frontiers.png``: learning against forgetting in P1's trials, from ``p2.jsonl``.

From the root of a clone: ``PYTHONPATH=. python docs/results/frontiers.py``. The trials have one seed, and so the same
validation questions; those of the final runs differ by seed.
"""

from pathlib import Path

from matplotlib.figure import Figure

from recipes.studies.rows import Row, read

ROWS = Path("docs/results/p2.jsonl")
SIDES = {"without": ("LoRA", "tab:blue"), "with": ("EFMLoRA", "tab:orange")}


def envelope(trials: list[Row]) -> list[Row]:
    """Return the trials than which none has learnt more and forgotten less, from the one that has learnt the most."""
    found: list[Row] = []
    for row in sorted(trials, key=lambda row: row["val_loss"]):
        if not found or row["rise"] < found[-1]["rise"]:
            found.append(row)
    return found


def places(trials: list[Row]) -> tuple[list[float], list[float]]:
    """Where they are in the picture."""
    return [row["val_loss"] for row in trials], [row["rise"] for row in trials]


def main() -> None:
    """Draw a circle for each trial, and a line through each side's envelope."""
    rows = read(ROWS)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for side, (name, color) in SIDES.items():
        trials = [row for row in rows if row["side"] == side and row["stage"] == "search"]
        axes.scatter(*places(trials), color=color, label=name)
        axes.plot(*places(envelope(trials)), color=color)
    axes.set_xscale("log")
    axes.set_xticks([3, 4, 5, 6, 8], ["3", "4", "5", "6", "8"])
    axes.minorticks_off()
    axes.set_xlabel("validation loss of the new task (nats per token)")
    axes.set_ylabel("rise of the loss on other texts (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(ROWS.with_name("frontiers.png"), dpi=130)


if __name__ == "__main__":
    main()
