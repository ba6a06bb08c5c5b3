"""Draws ``frontiers.png``: learning against forgetting in P1's trials, from ``p2.jsonl``.

Run it from the root of a clone.
"""

from pathlib import Path

from matplotlib.figure import Figure

from recipes.shared.ledger import Row, read

ROWS = Path("docs/results/p2.jsonl")
SIDES = {"without": ("LoRA", "tab:blue"), "with": ("EFMLoRA", "tab:orange")}


def envelope(rows: list[Row]) -> list[Row]:
    """The trials than which no other one has learnt more and forgotten less, from the one that has learnt the most."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        if not found or row["rise"] < found[-1]["rise"]:
            found.append(row)
    return found


def main() -> None:
    """Trials as circles with each side's envelope, and the winners' final runs as small dots."""
    rows = read(ROWS)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for side, (name, color) in SIDES.items():
        trials = [row for row in rows if row["side"] == side and row["stage"] == "search"]
        finals = [row for row in rows if row["side"] == side and row["stage"] == "final"]
        best = envelope(trials)
        axes.plot([row["val_loss"] for row in best], [row["rise"] for row in best], color=color)
        axes.scatter([row["val_loss"] for row in trials], [row["rise"] for row in trials], color=color, label=name)
        axes.scatter([row["val_loss"] for row in finals], [row["rise"] for row in finals], s=6, color=color, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("validation loss of the new task (nats per token)")
    axes.set_ylabel("rise of the loss on general text (nats per token)")
    axes.legend(title="circles: trials; dots: final runs", frameon=False)
    figure.savefig(ROWS.with_name("frontiers.png"), dpi=130)


if __name__ == "__main__":
    main()
