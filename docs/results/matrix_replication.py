"""The replication of column A in protocol_matrix.md: SmolLM2 on CommonsenseQA, in P1's setup.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/matrix_replication.py FOLDER``. When all runs
are done, the rows are in ``FOLDER/results.jsonl`` and the table is in ``FOLDER/table.md``. The same command resumes,
and several processes may share the runs. On another machine, a second argument is the file with the rows so far. It
needs the rows of column A, ``matrix_a.jsonl``.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from around import losses  # in this folder
from calibrated import Calibration
from matrix_choice import EFMLORA, LORA, RANDOM, SEARCH_SEEDS, chosen, chosen_freely, settings_of
from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN, Change, layers_of, noise_on_B, noise_on_base
from p2 import PLAIN, RECIPE
from peft import PeftModel
from shared_runs import queue_of, run_of, work_in_stages

from recipes.studies.process import commit, fit
from recipes.studies.rows import Row, read
from recipes.studies.statistics import estimate, with_error, with_interval
from recipes.studies.tables import markdown
from recipes.tune.search import finite_or_worst, value_of_kept

RESULTS = Path(__file__).parent
RANK, RATE = 32, "3e-3"
Rivals = Mapping[str, tuple[int, str]]
RIVALS = {"rank 8": (8, RATE), "rank 32": (RANK, RATE), "rate 1e-3": (RANK, "1e-3")}
"""Ranks and rates of LoRA: its two choices in P1, which had one rate and one dropout, and column A's free rival."""
AUDITED = {"rate 1e-2": (RANK, "1e-2"), "rank 128": (128, RATE)}
"""Those of the audit, beyond the best of the rivals."""
STRENGTHS = {EFMLORA: [0.05, 0.2, 0.8, 3.2], RANDOM: [0.03, 0.1, 0.3, 1.0]}
DISTURBANCE = {EFMLORA: B_NOISE, RANDOM: BASE_NOISE}
"""The disturbance of column A for which each method was chosen."""
NEAREST = 2  # strengths of a method with final runs
SEEDS = range(100, 110)
AUDIT_SEEDS = SEEDS[:5]
QUESTIONS = 64
DRAWS = 4
SIZES: dict[str, tuple[Callable[[float, Iterable[int]], list[Change]], list[float]]] = {
    "base": (noise_on_base, [0.3]),
    "B": (noise_on_B, [3.0, 10.0]),
}


class Run(NamedTuple):
    """One training.

    Attributes:
        arm: LoRA or a key of :data:`STRENGTHS`.
        rank: alpha is twice the rank.
        strength: rho or sigma; None for LoRA.
        seed: for the adapter's start, dropout, the order of the batches, and noise.
        stage: "search" for the runs that give a strength's cost on clean validation data, or "final".
        rate: as an option of the recipe.
    """

    arm: str
    rank: int
    strength: float | None
    seed: int
    stage: str
    rate: str = RATE

    @property
    def name(self) -> str:
        """The run's unique name, which is that of its folder."""
        return f"{self.arm}-{self.rank}-{self.rate}-{self.strength}-{self.seed}-{self.stage}"

    def key(self) -> Row:
        """Return the first entries of the run's row."""
        return self._asdict()

    def arguments(self) -> list[str]:
        """Return the arguments of the recipe's ``fit``."""
        settings = [f"--model.lora.r={self.rank}", f"--model.lora.lora_alpha={2 * self.rank}"]
        settings += [f"--model.learning_rate={self.rate}", "--model.lora.lora_dropout=0.1"]
        settings += ["--trainer.precision=bf16-mixed", f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        methods = {
            LORA: [],
            EFMLORA: ["--method=efmlora", f"--rho={self.strength}"],
            RANDOM: [
                "--trainer.callbacks+=lightning_flatlora.baselines.RandomPerturbation",
                f"--trainer.callbacks.sigma={self.strength}",
                f"--trainer.callbacks.seed={self.seed}",
            ],
        }
        return [*PLAIN, *settings, *methods[self.arm]]


# -- the measurement


def disturbances(seed: int) -> dict[str, list[Change]]:
    """Return a seed's draws of each disturbance; the first one is none."""
    draws = range(seed * DRAWS, (seed + 1) * DRAWS)
    found: dict[str, list[Change]] = {CLEAN: [lambda name, layer: layer]}
    for what, (kind, sizes) in SIZES.items():
        for size in sizes:
            found[f"{what}, noise {size:g}"] = kind(size, draws)
    return found


class Questions:
    """The base model, and the questions on which adapters are measured."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.rows = self.calibration.data.parts["test"].select(range(QUESTIONS))

    def measure(self, adapter: Path, seed: int) -> dict[str, float]:
        """Return an adapter's loss under each disturbance, in nats per token of the right answer."""
        net: Any = PeftModel.from_pretrained(self.calibration.base, str(adapter)).eval()
        batches = losses(net, self.rows, self.calibration.padding)
        found = {}
        for name, draws in disturbances(seed).items():
            drawn = []
            for change in draws:
                with changed(net, change), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    drawn.append(sum(float(loss()) for loss in batches) / len(batches))
            found[name] = sum(drawn) / len(drawn)
        self.calibration.base = net.unload()
        return found


@contextmanager
def changed(net: Any, change: Change) -> Iterator[None]:
    """Compute with disturbed layers, each merged with its adapter."""
    adapted = {}
    for path, module in net.named_modules():
        if hasattr(module, "lora_B"):
            adapted[path.removeprefix("base_model.model.")] = module.base_layer.weight
    kept = {name: weight.detach().clone() for name, weight in adapted.items()}
    try:
        with net.disable_adapter(), torch.no_grad():
            for name, layer in layers_of(net, kept).items():
                adapted[name].copy_(change(name, layer).merged())
            yield
    finally:
        with torch.no_grad():
            for name, weight in adapted.items():
                weight.copy_(kept[name])


@cache
def questions() -> Questions:
    """Return the questions, which all runs share."""
    return Questions()


def perform(run: Run, folder: Path) -> Row:
    """Train; a final run's adapter is measured too."""
    gc.collect()  # frees the last run's model, which contains cycles
    fitted = fit(RECIPE, folder / run.name, run.arguments())
    row = {"value": finite_or_worst(value_of_kept(fitted, "val_loss"), "min"), "commit": commit()}
    if run.stage == "final":
        # The adapter's folder has the name of the checkpoint next to it.
        adapter = folder / run.name / "fit" / "checkpoints" / Path(fitted["best"]).stem
        row["test"] = questions().measure(adapter, run.seed)
    return row


# -- the stages


def costs(rows_of_a: Sequence[Row]) -> dict[str, float]:
    """Return what each method costs in column A, in nats of clean validation loss more than LoRA's choice."""
    settings = settings_of(rows_of_a)
    found = {}
    for method, disturbance in DISTURBANCE.items():
        clean = []
        for arm in (method, LORA):
            choice = chosen(settings, arm, disturbance) or chosen_freely(settings, arm, disturbance)
            clean.append(choice.mean(CLEAN, SEARCH_SEEDS))
        found[method] = clean[0] - clean[1]
    return found


def scan(rows: Sequence[Row]) -> list[Run]:
    """Return the runs that show what each strength costs here."""
    first = Run(LORA, RANK, None, SEARCH_SEEDS[0], "search")
    runs = [first]
    for method, strengths in STRENGTHS.items():
        runs += [first._replace(arm=method, strength=strength) for strength in strengths]
    return runs


def strengths_of(rows: Sequence[Row], cost: Mapping[str, float]) -> dict[str, list[float]]:
    """Return of each method the strengths whose costs here are nearest to those in column A, in ascending order."""
    searched = {(row["arm"], row["strength"]): row["value"] for row in rows if row["stage"] == "search"}
    of_lora = searched[LORA, None]

    def distance(method: str, strength: float) -> float:
        return abs(searched[method, strength] - of_lora - cost[method])

    found = {}
    for method, strengths in STRENGTHS.items():
        found[method] = sorted(sorted(strengths, key=partial(distance, method))[:NEAREST])
    return found


def arms(rows: Sequence[Row], cost: Mapping[str, float]) -> list[Run]:
    """Return the final runs on the first seed: LoRA's, then the methods'."""
    found = of_lora(RIVALS)
    for method, strengths in strengths_of(rows, cost).items():
        found += [Run(method, RANK, strength, SEEDS[0], "final") for strength in strengths]
    return found


def final(cost: Mapping[str, float], rows: Sequence[Row]) -> list[Run]:
    """Return the final runs, seed by seed."""
    return [run._replace(seed=seed) for seed, run in product(SEEDS, arms(rows, cost))]


def audited(rows: Sequence[Row]) -> list[Run]:
    """Return the final runs of the audit, seed by seed."""
    return [run._replace(seed=seed) for seed, run in product(AUDIT_SEEDS, of_lora(AUDITED))]


def of_lora(rivals: Rivals) -> list[Run]:
    """Return LoRA's final runs on the first seed."""
    return [Run(LORA, rank, None, SEEDS[0], "final", rate) for rank, rate in rivals.values()]


def table(rows: Sequence[Row], cost: Mapping[str, float]) -> str:
    """Return the table of the replication; every run must be there."""
    return _table(rows, arms(rows, cost), RIVALS, SEEDS)


def audit_table(rows: Sequence[Row], cost: Mapping[str, float]) -> str:
    """Return the table of the audit; every run must be there."""
    return _table(rows, [*of_lora(AUDITED), *arms(rows, cost)], AUDITED, AUDIT_SEEDS)


def tables(rows: Sequence[Row], cost: Mapping[str, float]) -> str:
    """Return both tables; every run must be there."""
    return f"{table(rows, cost)}\n{audit_table(rows, cost)}"


def _table(rows: Iterable[Row], runs: Iterable[Run], rivals: Rivals, seeds: Sequence[int]) -> str:
    """Return the losses of runs on some seeds, and their differences to LoRA's rivals."""
    tests = {run_of(row, Run): row.get("test") for row in rows}

    def on_test(run: Run, disturbance: str) -> list[float]:
        return [tests[run._replace(seed=seed)][disturbance] for seed in seeds]

    head = ["disturbance", "arm", "rank", "rate", "strength", "test loss"]
    lines = [[*head, *(f"minus LoRA's, {rival}" for rival in rivals)]]
    for disturbance, run in product(disturbances(SEEDS[0]), runs):
        own = on_test(run, disturbance)
        cells = [with_error(estimate(own), ".3f")]
        for rival in of_lora(rivals):
            pairs = zip(own, on_test(rival, disturbance), strict=True)
            difference = estimate([mine - its for mine, its in pairs])
            cells.append("" if run == rival else with_interval(difference, 3))
        strength = "" if run.strength is None else f"{run.strength:g}"
        lines.append([disturbance, run.arm, str(run.rank), run.rate, strength, *cells])
    return f"{markdown(lines)}\n"


def main(folder: Path, finished: Path | None = None) -> None:
    """Do all runs but the finished ones, and write the rows and the table."""
    cost = costs(read(RESULTS / "matrix_a.jsonl"))
    queue = queue_of(folder, "matrix_replication", Run, {"questions": QUESTIONS}, finished)
    stages = (scan, partial(final, cost), audited)
    work_in_stages(queue, stages, partial(perform, folder=folder), folder, partial(tables, cost=cost))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
