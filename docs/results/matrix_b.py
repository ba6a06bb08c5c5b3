"""Column B of protocol_matrix.md: unlearning that is attacked by relearning.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/matrix_b.py FOLDER``. When all runs are done,
the rows are in ``FOLDER/results.jsonl`` and the table is in ``FOLDER/table.md``. The same command resumes, and several
processes may share the runs. On another machine, a second argument is the file with the rows so far.
"""

import gc
import math
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matrix_choice import (  # in this folder
    BEST,
    FINAL_SEEDS,
    FURTHER,
    SEARCH_SEEDS,
    extended_by,
    on_first_seed,
    points,
    resamplings,
)
from matrix_facts import Knowledge, known
from matrix_table import Comparison, Finals, between, finals_of, resampled_interval, short
from matrix_unlearning import (
    ATTACKS,
    FMLORA,
    LORA,
    OTHER_RATES,
    RANDOM,
    SPACE,
    STRENGTHS,
    Run,
    attacked,
    parts_of,
    unlearned,
)
from scipy import stats
from shared_runs import open_runs, queue_of, work_in_stages

from recipes.command_line.progress import quiet
from recipes.demo.training import on_one_thread
from recipes.studies.process import commit
from recipes.studies.rows import Row
from recipes.studies.statistics import estimate, with_error, with_interval
from recipes.studies.tables import markdown

POINTS = 32
HYPERCUBE = 1  # the first seed that draws 32 different settings
LEAST_UTILITY = 0.95  # that a choice must have; before unlearning it is 1
MOST_RISE = 0.3  # of the loss of general texts, in nats per token
BEYOND: dict[str, list[Any]] = {
    "rate": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "steps": [12, 25, 50, 100],
    "beta": [0.02, 0.1, 0.5, 2.5],
    "retain": [0.3, 1, 3, 10, 30],
}
"""The values by which a grid can be extended, if an arm's best setting lies at its end, and its own."""
EXTENDED = 4  # best settings that are run with a value beyond
FARTHEST = FURTHER**2  # factor beyond a grid of strengths
PRIMARY = str(ATTACKS[-1])
"""The number of the attack's steps."""
ATTACKED_AGAIN = FINAL_SEEDS[:4]  # with other rates: one seed for each town
TESTED = {"B1": FMLORA, "B2": RANDOM}
"""The hypotheses and their methods."""


class Setting(NamedTuple):
    """An arm's setting and its rows of the search.

    Attributes:
        run: the first seed's.
        rows: by seed.
    """

    run: Run
    rows: dict[int, Row]

    def recalled(self, seeds: Sequence[int]) -> float:
        """Return the mean recall of the hidden facts after the attack over seeds, which may repeat."""
        return sum(self.rows[seed]["recall"][PRIMARY] for seed in seeds) / len(seeds)

    def utility(self, seeds: Sequence[int]) -> float:
        """Return the mean utility over seeds, which may repeat."""
        return sum(self.rows[seed]["utility"] for seed in seeds) / len(seeds)

    def rise(self, seeds: Sequence[int]) -> float:
        """Return the mean rise of the loss of general texts over seeds, which may repeat."""
        return sum(self.rows[seed]["rise"] for seed in seeds) / len(seeds)

    def is_useful(self, seeds: Sequence[int]) -> bool:
        """Say whether the mean utility over seeds, which may repeat, is high enough, and little else is lost."""
        return self.utility(seeds) >= LEAST_UTILITY and self.rise(seeds) <= MOST_RISE

    def excess(self) -> float:
        """Return by how much the first seed's utility misses its bounds, as a share of what they allow."""
        first = SEARCH_SEEDS[:1]
        lost = (1 - self.utility(first)) / (1 - LEAST_UTILITY)
        risen = self.rise(first) / MOST_RISE
        return max(lost, risen) if math.isfinite(risen) else math.inf

    def sort_key(self, seeds: Sequence[int]) -> tuple[float, float]:
        """Return what the lowest is chosen by: the recall of the hidden facts, then their log-likelihood."""
        likelihood = sum(self.rows[seed]["likelihood"][PRIMARY] for seed in seeds) / len(seeds)
        return self.recalled(seeds), likelihood


def perform(run: Run, knowledge: Knowledge) -> Row:
    """Unlearn, attack and measure.

    Returns:
        A JSON line without the run's key: what :func:`attacked` returns, on some final seeds with the recall after
        attacks with ``other_rates``; the ``utility``, which is the recall of facts that no loss has seen; the ``rise``
        of the loss of general texts, in nats per token; seconds of processor time; and the digest of the model that
        knows the facts.
    """
    gc.collect()  # the last run's models: their parts point at each other
    began = time.process_time()
    net = unlearned(knowledge, run)
    utility = known(net, knowledge.texts, parts_of(run.seed).kept).recall
    rise = knowledge.general_loss(net) - knowledge.loss
    net = net.merge_and_unload()
    found = attacked(knowledge, net, run.seed)
    if run.stage == "final" and run.seed in ATTACKED_AGAIN:
        others = [attacked(knowledge, net, run.seed, rate) for rate in OTHER_RATES]
        found["other_rates"] = [other["recall"][PRIMARY] for other in others]
    return {
        "value": found["recall"][PRIMARY],
        **found,
        "utility": utility,
        "rise": rise,
        "seconds": time.process_time() - began,
        "taught": knowledge.digest,
        "torch": torch.__version__,
        "commit": commit(),
    }


# -- the choice


def searched() -> list[Run]:
    """Return the runs of all settings on the first seed, LoRA's first."""
    runs = on_first_seed(Run, points(SPACE, POINTS, HYPERCUBE), STRENGTHS)
    return sorted(runs, key=lambda run: run.arm != LORA)


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """Gather the rows of the search by arm and setting."""
    found: dict[str, Setting] = {}
    for row in rows:
        if row["stage"] == "search":
            run = Run(row["arm"], row["settings"], row["strength"], SEARCH_SEEDS[0])
            found.setdefault(run.name, Setting(run, {})).rows[row["seed"]] = row
    return list(found.values())


def ranked(settings: Sequence[Setting], arm: str) -> list[Setting]:
    """Return an arm's settings: those useful on the first seed, by their recall, then the others, by their excess."""
    first = SEARCH_SEEDS[:1]
    own = [each for each in settings if each.run.arm == arm]
    useful = [each for each in own if each.is_useful(first)]
    others = [each for each in own if not each.is_useful(first)]
    return sorted(useful, key=lambda each: each.sort_key(first)) + sorted(others, key=Setting.excess)


def chosen(settings: Sequence[Setting], arm: str, seeds: Sequence[int] = SEARCH_SEEDS) -> Setting:
    """Choose among the best eight of the first seed by the means over seeds, which may repeat.

    Returns:
        The useful setting with the lowest recall; if none is useful, the one with the highest utility.
    """
    best = ranked(settings, arm)[:BEST]
    useful = [each for each in best if each.is_useful(seeds)]
    if not useful:
        return max(best, key=lambda each: each.utility(seeds))
    return min(useful, key=lambda each: each.sort_key(seeds))


# -- the stages


def extended(rows: Iterable[Row]) -> list[Run]:
    """Return the runs that extend the grids, as far as the rows can tell."""

    def more(seen: list[Setting]) -> list[Run]:
        runs: list[Run] = []
        for arm in STRENGTHS:
            runs += further(seen, arm)
        return runs

    return extended_by(more, {each.run.name: each for each in settings_of(rows)}, searched())


def further(settings: Sequence[Setting], arm: str) -> list[Run]:
    """Return the arm's best settings one value beyond a grid, for each grid at whose end its best setting lies."""
    order = [each.run for each in ranked(settings, arm)]
    best, changed = order[0], list[list[Run]]()
    if best.strength is not None:
        strengths, grid = [run.strength for run in order], STRENGTHS[arm]
        at_ends = {max(strengths): best.strength * FURTHER, min(strengths): best.strength / FURTHER}
        strength = at_ends.get(best.strength, math.inf)
        if min(grid) / FARTHEST <= strength <= max(grid) * FARTHEST:
            changed.append([run._replace(strength=strength) for run in order])
    for name, values in BEYOND.items():
        value, tried = best.settings[name], [run.settings[name] for run in order]
        place = values.index(value)
        next_ones = values[place + 1 : place + 2] if value == max(tried) else []
        if value == min(tried):
            next_ones += values[:place][-1:]
        for other in next_ones:
            changed.append([run._replace(settings={**run.settings, name: other}) for run in order])
    found: list[Run] = []
    for runs in changed:
        different = {run.name: run for run in runs}  # some differ in the changed value only
        found += list(different.values())[:EXTENDED]
    return found


def repeated(rows: Iterable[Row]) -> list[Run]:
    """Return the runs of each arm's best eight on the other search seeds."""
    settings, best = settings_of(rows), list[Setting]()
    for arm in STRENGTHS:
        best += ranked(settings, arm)[:BEST]
    return [setting.run._replace(seed=seed) for setting, seed in product(best, SEARCH_SEEDS[1:])]


def choices(settings: Sequence[Setting], arm: str) -> list[Setting]:
    """Return an arm's choice for each resampling of the search seeds; that of all seeds where none is useful."""
    found = []
    for seeds in resamplings():
        choice = chosen(settings, arm, seeds)
        found.append(choice if choice.is_useful(seeds) else chosen(settings, arm))
    return found


def final(rows: Iterable[Row]) -> list[Run]:
    """Return the final runs of the arms' choices, seed by seed."""
    settings = settings_of(rows)
    return judged([chosen(settings, arm) for arm in STRENGTHS])


def resampled(rows: Iterable[Row]) -> list[Run]:
    """Return the final runs of all choices that a resampling of the search seeds makes, seed by seed."""
    settings, every = settings_of(rows), list[Setting]()
    for arm in STRENGTHS:
        every += choices(settings, arm)
    return judged(every)


def judged(settings: Iterable[Setting]) -> list[Run]:
    """Return the final runs of settings, seed by seed."""
    runs = {setting.run.name: setting.run for setting in settings}
    return [run._replace(seed=seed, stage="final") for seed, run in product(FINAL_SEEDS, runs.values())]


STAGES = (lambda rows: searched(), extended, repeated, final, resampled)


def is_decided(rows: Sequence[Row]) -> bool:
    """Say whether the rows have the hypotheses' results; those of resampled searches may be missing."""
    done = {(row["stage"], Run(row["arm"], row["settings"], row["strength"], row["seed"]).name) for row in rows}
    return not open_runs(rows, lambda run: (run.stage, run.name) in done, STAGES[:-1])


# -- the table


def recalls(finals: Finals, setting: Setting, steps: str = PRIMARY) -> list[float]:
    """Return the recall of the hidden facts after a number of the attack's steps, by final seed."""
    return [finals[setting.run.name][seed]["recall"][steps] for seed in FINAL_SEEDS]


def likelihoods(finals: Finals, setting: Setting) -> list[float]:
    """Return the mean log-likelihood of the hidden facts after the whole attack, in nats, by final seed."""
    return [finals[setting.run.name][seed]["likelihood"][PRIMARY] for seed in FINAL_SEEDS]


def final_utility(finals: Finals, setting: Setting) -> float:
    """Return the mean utility over the final seeds."""
    return estimate([finals[setting.run.name][seed]["utility"] for seed in FINAL_SEEDS]).mean


def compared(settings: Sequence[Setting], finals: Finals, arm: str) -> Comparison | None:
    """Compare an arm's recall of the hidden facts with LoRA's; None if either has no useful setting, so that p is 1."""
    own, of_lora = (chosen(settings, each) for each in (arm, LORA))
    if not (own.is_useful(SEARCH_SEEDS) and of_lora.is_useful(SEARCH_SEEDS)):
        return None
    mine, its = (recalls(finals, each) for each in (own, of_lora))
    p = float(stats.ttest_rel(mine, its).pvalue)
    return Comparison(
        means=(estimate(its).mean, estimate(mine).mean),
        difference=estimate(np.subtract(mine, its).tolist()),
        p=1.0 if math.isnan(p) else p,  # nan if they are equal on all seeds
        covering=covering(settings, finals, arm),
    )


def covering(settings: Sequence[Setting], finals: Finals, arm: str) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference to LoRA's recall that covers the search; None if runs are missing."""
    differences = []
    for mine, its in zip(choices(settings, arm), choices(settings, LORA), strict=True):
        if any(finals[each.run.name].keys() != set(FINAL_SEEDS) for each in (mine, its)):
            return None
        differences.append(np.subtract(recalls(finals, mine), recalls(finals, its)))
    return resampled_interval(differences)


def table(rows: Sequence[Row]) -> str:
    """Return the table of all arms, and what is compared; every run must be there."""
    settings, finals = settings_of(rows), finals_of(rows)
    on_fresh = partial(recalls, finals)
    head = ["arm", "strength; rate, steps, beta, retain, rank, optimizer, averaging"]
    attacked_for = [str(steps) for steps in (0, *ATTACKS)]
    measures = {"shown": "shown facts after 30", "utility": "utility", "rise": "rise of general texts"}
    lines = [[*head, *(f"recall after {each}" for each in attacked_for), "likelihood after 30", *measures.values()]]
    differences = [["arm", "minus LoRA's", "p", "search resampled", "log-likelihood minus LoRA's", "p"]]
    of_lora = likelihoods(finals, chosen(settings, LORA))
    for arm in STRENGTHS:
        choice = chosen(settings, arm)
        own = finals[choice.run.name]
        cells = [with_error(estimate(on_fresh(choice, each)), ".3f") for each in attacked_for]
        cells.append(with_error(estimate(likelihoods(finals, choice)), ".2f"))
        for measure in measures:
            cells.append(with_error(estimate([own[seed][measure] for seed in FINAL_SEEDS]), ".3f"))
        lines.append([arm, short(choice), *cells])
    for arm in TESTED.values():
        found, cells = compared(settings, finals, arm), ["no useful setting", "1", ""]
        if found:
            cells = [with_interval(found.difference, 3), f"{found.p:.2g}", between(found.covering, 3)]
        own_likelihoods = likelihoods(finals, chosen(settings, arm))
        cells.append(with_interval(estimate(np.subtract(own_likelihoods, of_lora).tolist()), 2))
        cells.append(f"{stats.ttest_rel(own_likelihoods, of_lora).pvalue:.2g}")
        differences.append([arm, *cells])
    return f"{markdown(lines)}\n\n{markdown(differences)}\n"


# -- all runs


def main(folder: Path, finished: Path | None = None) -> None:
    """Do all runs but the finished ones, and write the rows and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    knowledge = Knowledge(folder / "taught.safetensors")
    shared = {"space": SPACE, "points": POINTS, "taught": knowledge.digest}
    queue = queue_of(folder, "matrix_b", Run, shared, finished)
    if any(row["taught"] != knowledge.digest for row in queue.rows if row["stage"] == "final"):
        raise ValueError(
            "Final runs had another model that knows the facts: this processor computes differently. "
            "Go on in a new folder, with the rows of the search only."
        )
    work_in_stages(queue, STAGES, partial(perform, knowledge=knowledge), folder, table)


if __name__ == "__main__":
    quiet()
    on_one_thread()
    main(*map(Path, sys.argv[1:]))
