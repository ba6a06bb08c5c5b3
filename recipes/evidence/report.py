"""What the rows say: a table of all arms, the surface of each search, the verdict, and a forest plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.evidence.in_turn_report import in_turn_figure, in_turn_tables
from recipes.evidence.merging_report import merging_figure, merging_tables
from recipes.evidence.noise_report import noise_figure, noise_tables
from recipes.evidence.plan import Plan
from recipes.evidence.search import common_grid, mean_loss
from recipes.evidence.verdict import Difference, Verdict, difference, verdict
from recipes.evidence.workloads import (
    ARMS,
    BASELINE,
    CANDIDATE,
    SEARCH_SEEDS,
    SEARCHED_AS,
    SEARCHES,
    SEEDS,
    TITLES,
    WITH_HYPOTHESIS,
    WORKLOADS,
    Config,
    competitors_of,
    is_in_turn,
    is_merging,
)
from recipes.shared.ledger import Row
from recipes.shared.statistics import estimate
from recipes.shared.tables import Table, settings_text

_COLUMNS = (
    "arm", "chosen", "seeds", "accuracy in %", "minus LoRA's", "EFMLoRA minus this row", "test loss", "scaled",
    "ECE in %", "scaled", "Brier", "scaled", "train loss", "failed", "seconds",
)  # fmt: skip


class Report:
    """Of one workload.

    Args:
        plan: whose rows are shown.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.grid = common_grid(plan.chosen)
        self.rows: dict[str, list[Row]] = {}
        self.configs: dict[str, Config] = {}
        for arm in ARMS:
            config = plan.config_of(arm, self.grid)
            rows = plan.test_rows(arm, config) if config is not None else []
            if config is not None and rows:
                self.configs[arm] = config
                self.rows[arm] = rows

    def accuracies(self, arm: str) -> dict[int, float]:
        """By seed, in percent."""
        return {row["seed"]: 100 * row["test_accuracy"] for row in self.rows.get(arm, ())}

    def verdict(self) -> Verdict | None:
        """Of the workload's primary hypothesis, None while there are no runs for it."""
        competitors = {TITLES[arm]: self.accuracies(arm) for arm in competitors_of(self.plan.settings)}
        return verdict(self.accuracies(CANDIDATE), self.accuracies(BASELINE), competitors)

    def tables(self) -> list[Table]:
        """The arms, what they keep where something costs them accuracy, and the search of each method."""
        shown = [self._arms()] if self.rows else []
        of_workload = (self.plan.workload, self.plan.settings, self.rows)
        if is_merging(self.plan.settings):
            shown += merging_tables(*of_workload)
        elif is_in_turn(self.plan.settings):
            shown += in_turn_tables(*of_workload)
        if self.plan.settings.get("judged") == "best":
            shown += noise_tables(self.plan.workload, self._at_all_shares())
        for method in SEARCHES:
            surface = self._surface(method)
            if surface is not None:
                shown.append(surface)
        return shown

    def forest(self) -> Figure | None:
        """The differences of all arms to LoRA with their intervals, in accuracy and in test loss."""
        accuracies = self._differences("test_accuracy", 100.0)
        if not accuracies:
            return None
        figure = Figure(figsize=(11, 1.6 + 0.35 * len(accuracies)), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True)
        _panel(left, accuracies, "test accuracy minus LoRA's, points")
        _panel(middle, self._differences("test_loss", 1.0), "test loss minus LoRA's, nats")
        _panel(right, self._differences("test_loss_scaled", 1.0), "the same after temperature scaling")
        figure.suptitle(f"{self.plan.workload}: mean and 95 % interval of paired differences")
        return figure

    def kept(self) -> Figure | None:
        """Accuracies against the number of adapters merged, or of tasks learned, where there are several."""
        of_workload = (self.plan.workload, self.plan.settings, self.rows)
        if is_merging(self.plan.settings):
            return merging_figure(*of_workload)
        return in_turn_figure(*of_workload) if is_in_turn(self.plan.settings) else None

    def noise(self) -> Figure | None:
        """Accuracies against the share of labels replaced, where other workloads differ in it alone."""
        return noise_figure(self.plan.workload, self._at_all_shares())

    def _at_all_shares(self) -> dict[str, list[Row]]:
        """The rows on the test part by arm, with those of the workloads that take this one's settings."""
        plan = self.plan
        rows = {arm: list(of_arm) for arm, of_arm in self.rows.items()}
        for name, searched_as in SEARCHED_AS.items():
            settings = {**WORKLOADS[name], "precision": plan.settings["precision"]}
            # Noise of another kind has a report of its own.
            if searched_as != plan.workload or settings.get("noise_to") != plan.settings.get("noise_to"):
                continue
            of_share = Plan(plan.folder, name, settings, plan.arms, plan.stages, plan.seeds)
            for arm in rows:
                rows[arm] += of_share.test_rows(arm, self.configs[arm])
        return rows

    def _differences(self, name: str, factor: float) -> dict[str, Difference]:
        base = _by_seed(self.rows.get(BASELINE, ()), name, factor)
        found = {}
        for arm in self.rows:
            own = difference(_by_seed(self.rows[arm], name, factor), base)
            if arm != BASELINE and own is not None:
                found[TITLES[arm]] = own
        return found

    def _arms(self) -> Table:
        notes = [f"chance: {100 * next(iter(self.rows.values()))[0]['chance']:.1f} %"]
        notes.append(
            "intervals: 95 %, Student's t over the seeds, paired; scaled: at a temperature fitted on validation"
        )
        if is_merging(self.plan.settings):
            notes.append("of the adapters merged by TIES, means over the tasks; train loss: before merging")
        if is_in_turn(self.plan.settings):
            notes.append("of the adapter after all tasks, means over the tasks; train loss: right after each task")
        return Table(f"{self.plan.workload}", _COLUMNS, [self._cells(arm) for arm in self.rows], notes)

    def _cells(self, arm: str) -> list[str]:
        rows, accuracies = self.rows[arm], self.accuracies(arm)
        accuracy = estimate(list(accuracies.values()))
        to_base = difference(accuracies, self.accuracies(BASELINE)) if arm != BASELINE else None
        to_arm = difference(self.accuracies(CANDIDATE), accuracies) if arm != CANDIDATE else None
        return [
            TITLES[arm],
            settings_text(self.configs[arm]),
            str(len(rows)),
            f"{accuracy.mean:.1f}" + ("" if math.isnan(accuracy.error) else f" ± {accuracy.error:.1f}"),
            str(to_base or ""),
            str(to_arm or ""),
            _mean(rows, "test_loss", ".3f"),
            _mean(rows, "test_loss_scaled", ".3f"),
            _mean(rows, "test_ece", ".1f", 100.0),
            _mean(rows, "test_ece_scaled", ".1f", 100.0),
            _mean(rows, "test_brier", ".3f"),
            _mean(rows, "test_brier_scaled", ".3f"),
            _mean(rows, "train_loss", ".3f"),
            str(sum(row["failed"] for row in rows)),
            _mean(rows, "seconds", ".1f"),
        ]

    def _surface(self, method: str) -> Table | None:
        """Mean validation loss, and accuracy, of each trial."""
        chosen = self.plan.chosen(method, self.grid)
        rates = self.grid.learning_rates
        lines = []
        # Those beyond the common grid, which an arm may have tried, and not those that the end of a grid has left out.
        for setting in self.grid.with_all_settings(method).settings(method):
            cells = [self._trial(method, {"learning_rate": rate, **setting}, chosen) for rate in rates]
            if any(cells):
                lines.append([settings_text(setting) or "none", *cells])
        # The first line is LoRA's own, which all methods have.
        if not any(any(line[1:]) for line in lines[1:]):
            return None
        columns = ("setting", *(f"rate {rate:g}" for rate in rates))
        note = f"mean validation loss in nats (accuracy in %) of {len(SEARCH_SEEDS)} runs; the chosen trial in brackets"
        return Table(f"{self.plan.workload}, search of {TITLES[method]}", columns, lines, [note])

    def _trial(self, method: str, config: Config, chosen: Config | None) -> str:
        rows = self.plan.search_rows(method, config)
        if not rows:
            return ""
        accuracy = 100 * statistics.mean(row["validation_accuracy"] for row in rows)
        cell = f"{mean_loss(rows):.3f} ({accuracy:.0f})"
        if len(rows) < len(SEARCH_SEEDS):
            # Of a search that is not done yet.
            cell += f", runs: {len(rows)}"
        return f"[{cell}]" if config == chosen else cell


def write(report: Report, folder: Path) -> list[Path]:
    """Write the tables and the verdict as Markdown, and the pictures; returns the paths."""
    name = report.plan.workload
    text = "\n".join(table.markdown() for table in report.tables())
    paths = [folder / f"{name}.md"]
    paths[0].write_text(f"{verdict_text(report)}\n\n{text}", encoding="utf-8")
    figures = {f"{name}.png": report.forest(), f"{name}_kept.png": report.kept(), f"{name}_noise.png": report.noise()}
    for file, figure in figures.items():
        if figure is not None:
            paths.append(folder / file)
            figure.savefig(paths[-1], dpi=130)
    return paths


def verdict_text(report: Report) -> str:
    """The verdict in a sentence or two, with the differences that it rests on."""
    name, found = report.plan.workload, report.verdict()
    if found is None:
        return f"{name}: no verdict yet, since the runs for it are not done."
    seeds = found.baseline.estimate.values
    # The protocol looks after 8 seeds and after all, and at no other moment.
    if seeds < len(SEEDS) and not report.plan.has_ended_early:
        so_far = f"the difference to LoRA so far is {found.baseline}"
        return f"{name}: no verdict yet, with {seeds} of {len(SEEDS)} seeds; {so_far}."
    lines = [f"{name}, {TITLES[CANDIDATE]} minus LoRA, {seeds} seeds: **{found.kind}**: {found.reason}."]
    if name not in WITH_HYPOTHESIS:
        lines.append("The workload is secondary: no hypothesis of the protocol rests on it.")
    if report.plan.has_ended_early:
        lines.append("The workload has ended early, after eight seeds.")
    if found.p_holm is not None:
        lines.append(
            f"p of the difference to LoRA: {found.baseline.p:.2g}, at most {found.p_holm:.2g} by Holm's method."
        )
    return " ".join(lines)


def _panel(axes: Any, differences: Mapping[str, Difference], label: str) -> None:
    # Matplotlib counts from the bottom up, and the table from the top down.
    names = list(differences)[::-1]
    for place, name in enumerate(names):
        found = differences[name].estimate
        axes.errorbar(found.mean, place, xerr=found.interval, color="#4477aa", marker="o", capsize=4)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def _by_seed(rows: Sequence[Row], name: str, factor: float) -> dict[int, float]:
    return {row["seed"]: factor * row[name] for row in rows if row[name] is not None}


def _mean(rows: Sequence[Row], name: str, form: str, factor: float = 1.0) -> str:
    """Over the runs that have not failed."""
    values = [factor * row[name] for row in rows if row[name] is not None]
    return f"{statistics.mean(values):{form}}" if values else ""
