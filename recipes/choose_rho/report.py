"""What the runs of a sweep say: a table, a plot and one sentence."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from recipes.shared.ledger import Row
from recipes.shared.statistics import Estimate, estimate, with_error
from recipes.shared.tables import Table
from recipes.studies.choice import best


def by_radius(rows: Sequence[Row]) -> dict[float, dict[int, float]]:
    """The values of each radius by seed, with the radii in order."""
    values: dict[float, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["rho"]):
        values.setdefault(row["rho"], {})[row["seed"]] = row["value"]
    return values


def means(rows: Sequence[Row]) -> dict[float, Estimate]:
    """Mean and standard error over the seeds of each radius, with the radii in order."""
    return {rho: _estimate(list(values.values())) for rho, values in by_radius(rows).items()}


def _estimate(values: Sequence[float]) -> Estimate:
    if all(map(math.isfinite, values)):
        return estimate(values)
    # One run that diverged is enough to avoid a radius.
    return Estimate(sum(values), math.nan, len(values))


def chosen(rows: Sequence[Row]) -> float:
    """The radius with the best mean, the smaller one of equal ones."""
    sign = -1 if rows[0]["mode"] == "min" else 1
    values = by_radius(rows)
    trials = []
    for of_seeds in values.values():
        trials.append([(sign * value,) for value in of_seeds.values()])
    return list(values)[best(trials)]


def difference(rows: Sequence[Row]) -> Estimate | None:
    """The chosen radius minus rho = 0, paired by seed; None where one of the two is not there."""
    values = by_radius(rows)
    rho = chosen(rows)
    if rho == 0 or 0 not in values:
        return None
    return _estimate([values[rho][seed] - values[0][seed] for seed in values[rho]])


def table(rows: Sequence[Row]) -> Table:
    """A line for each radius."""
    best = chosen(rows)
    lines = []
    for rho, found in means(rows).items():
        mark = "best" if rho == best else ""
        lines.append([f"{rho:g}", with_error(found, ".4f"), str(found.values), mark])
    metric, mode = rows[0]["metric"], rows[0]["mode"]
    note = f"best {metric} of each run ({mode}), mean and standard error over the seeds"
    return Table("Choosing rho", ("rho", metric, "seeds", ""), lines, [note])


def draw(rows: Sequence[Row]) -> Figure:
    """The metric against rho, on a logarithmic scale that also has room for 0."""
    found = means(rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    positive = [rho for rho in found if rho > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=min(positive))
    shown = {rho: each for rho, each in found.items() if math.isfinite(each.mean)}
    errors = [each.error if each.values > 1 else 0.0 for each in shown.values()]
    axes.errorbar(list(shown), [each.mean for each in shown.values()], yerr=errors, marker="o", capsize=3)
    axes.axvline(chosen(rows), color="grey", linestyle=":")
    axes.set_xticks(list(found), [f"{rho:g}" for rho in found])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("rho (0 is plain LoRA)")
    axes.set_ylabel(rows[0]["metric"])
    return figure


def advice(rows: Sequence[Row]) -> str:
    """Which radius to take, and how sure that is."""
    found = means(rows)
    rho = chosen(rows)
    if rho == 0:
        return "No radius is better than 0 here: take plain LoRA."
    sentences = [f"Take rho = {rho:g}."]
    to_lora = difference(rows)
    if to_lora is not None and to_lora.values == 1:
        sentences.append("One seed can't tell a gain from chance: run it again with more, such as --seeds 0 1 2.")
    elif to_lora is not None:
        sentences.append(f"Its difference to plain LoRA is {with_error(to_lora, '+.4f')}.")
        if abs(to_lora.mean) < to_lora.interval:
            sentences.append("The 95 % interval of that contains 0, so it may be chance.")
    if rho == max(found):
        sentences.append(f"It is the largest that was tried: add {3 * rho:g} to --rho.")
    return " ".join(sentences)
