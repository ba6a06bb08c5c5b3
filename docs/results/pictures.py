"""Draw the pages' pictures from published rows; a method has the same colour in all of them.

From the root of a clone: ``PYTHONPATH=. python docs/results/pictures.py``.
"""

import json
from typing import Any

import matrix_picture
from figures import RESULTS, BySeed, Runs, accuracy, difference, over_small_tasks
from matplotlib.figure import Figure

from recipes.studies.colours import COLOURS
from recipes.studies.rows import Row, read
from recipes.studies.statistics import Estimate

LORA, EFMLORA, DROPOUT = COLOURS["LoRA"], COLOURS["EFMLoRA"], COLOURS["LoRA, dropout 0.9"]
REST = "tab:gray"


# -- study.png


Mark = tuple[str, Estimate | float]


def situations() -> dict[str, list[Mark]]:
    """Return the differences to tuned LoRA in each situation; means without an interval come from the audit."""
    w1, w2, w6 = Runs("w1"), Runs("w2"), Runs("w6")
    found: dict[str, list[Mark]] = {
        "six small tasks, mean": [
            ("EFMLoRA", over_small_tasks("efmlora")),
            ("change", over_small_tasks("lora_regularised")),
        ],
        "18 classes, 16 examples each": against(w1("lora"), w1("efmlora"), w1("linear_probe")),
    }
    lora = w2("lora", dropout=0.9)
    found["40 % of the labels wrong"] = against(lora, w2("efmlora"), w2("linear_probe"), w2("rank_2", dropout=0.9))
    # The search for EFMLoRA chose rho 0.
    at_rho_0 = w6("lora", dropout=None, weight_decay=None)
    found["1,024 film reviews per class"] = against(w6("lora", dropout=0.3), at_rho_0, w6("linear_probe"))
    for name, what, audited in (("w3", "six adapters merged", 74.5), ("w5", "six tasks, one after another", 75.25)):
        runs = Runs(name)
        lora, both = runs("lora", dropout=0.3), runs("efmlora_on_dropout")
        marks = against(lora, runs("efmlora"), runs("linear_probe"), runs("rank_2_more_dropout"))
        if name == "w5":
            marks.insert(2, ("both", difference(both, lora)))
        found[what] = [*marks[:-1], ("audit", audited - accuracy(lora)), marks[-1]]
    return found


def against(lora: BySeed, efmlora: BySeed, probe: BySeed, change: BySeed | None = None) -> list[Mark]:
    """Return a situation's marks: the difference of each of these runs to LoRA."""
    marks: list[Mark] = [("EFMLoRA", difference(efmlora, lora))]
    if change is not None:
        marks.append(("change", difference(change, lora)))
    return [*marks, ("probe", difference(probe, lora))]


STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "EFMLoRA": ("EFMLoRA", {"marker": "o", "color": EFMLORA}),
    "both": ("EFMLoRA with rank 2 and dropout 0.9", {"marker": "D", "color": EFMLORA, "markerfacecolor": "white"}),
    "change": ("LoRA with rank 2 and dropout 0.9\n(six small tasks: weight decay and dropout)",
               {"marker": "s", "color": DROPOUT}),
    "audit": ("LoRA with separate rates\nfor head and adapter (audit, mean only)", {"marker": "*", "color": LORA}),
    "probe": ("linear classifier, frozen encoder", {"marker": "^", "color": REST}),
}  # fmt: skip


def study() -> Figure:
    """Draw the situations, each as a group of lines."""
    figure = Figure(figsize=(7.8, 6.2), layout="constrained")
    axes = figure.subplots()
    place, names = 0.0, {}
    for situation, marks in situations().items():
        if names:
            axes.axhline(place - 1, color="lightgray", linewidth=0.8)
        seeds = next(mark.values for _, mark in marks if isinstance(mark, Estimate))
        names[f"{situation}\n({seeds} seeds)"] = place + (len(marks) - 1) / 2
        for kind, found in marks:
            mean, half = (found.mean, found.interval) if isinstance(found, Estimate) else (found, 0.0)
            axes.errorbar(mean, place, xerr=half or None, capsize=3, markersize=8, **STYLES[kind][1])
            place += 1
        place += 1
    for label, style in STYLES.values():
        axes.plot([], [], linestyle="", markersize=8, label=label, **style)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(list(names.values()), list(names))
    axes.invert_yaxis()
    axes.set_xlabel("difference to tuned LoRA in points of test accuracy, 95 % interval over seeds")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


# -- cost_large.png


def cost() -> Figure:
    """Draw the time of a step relative to LoRA's, with a panel for each model."""
    steps: list[Row] = json.loads((RESULTS / "cost_large.json").read_text(encoding="utf-8"))["steps"]
    models = list(dict.fromkeys(row["model"] for row in steps))
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), sharey=True), models, strict=True):
        of_model = {row["method"]: row["ratio_to_lora"] for row in steps if row["model"] == model}
        colours = [COLOURS.get(method, REST) for method in of_model]
        bars = axes.barh(list(of_model), list(of_model.values()), color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1, color="black", linestyle=":", linewidth=1)
        axes.set(title=model, xlabel="step time relative to LoRA", xlim=(0, 1.2 * max(of_model.values())))
    axes.invert_yaxis()
    return figure


# -- frontiers.png


def frontiers() -> Figure:
    """Draw learning against forgetting in P1's trials, and a line through each side's best trade-offs.

    The trials have one seed, and thus the same validation questions; those of the final runs differ by seed.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for side, title in {"without": "LoRA", "with": "EFMLoRA"}.items():
        trials = [row for row in read(RESULTS / "p2.jsonl") if row["side"] == side and row["stage"] == "search"]
        axes.scatter(*places(trials), color=COLOURS[title], label=title)
        axes.plot(*places(envelope(trials)), color=COLOURS[title])
    axes.set_xscale("log")
    axes.set_xticks([3, 4, 5, 6, 8], ["3", "4", "5", "6", "8"])
    axes.minorticks_off()
    axes.set_xlabel("validation loss of the new task (nats per token)")
    axes.set_ylabel("rise of the loss on other texts (nats per token)")
    axes.legend(frameon=False)
    return figure


def envelope(trials: list[Row]) -> list[Row]:
    """Return the trials that no other beats in both learning and forgetting, starting with the one that learnt most."""
    found: list[Row] = []
    for row in sorted(trials, key=lambda row: row["val_loss"]):
        if not found or row["rise"] < found[-1]["rise"]:
            found.append(row)
    return found


def places(trials: list[Row]) -> tuple[list[float], list[float]]:
    """Return the trials' coordinates in the picture."""
    return [row["val_loss"] for row in trials], [row["rise"] for row in trials]


# -- matrix.png


def matrix() -> Figure:
    """Draw what helps against which disturbance; column B when its rows decide."""
    column_a = read(RESULTS / "matrix_a.jsonl") + read(RESULTS / "matrix_rates.jsonl")
    return matrix_picture.draw(column_a, read(RESULTS / "matrix_b.jsonl"))


def main() -> None:
    """Draw all pictures."""
    pictures = {"study": study, "cost_large": cost, "frontiers": frontiers, "matrix": matrix}
    for name, draw in pictures.items():
        draw().savefig(RESULTS / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
