"""Is the perturbation worth it for your own run? One search with EFMLoRA and one without, and a sentence.

Give the recipe's name and the options of its `fit`. Both searches have as many trials of learning rate, dropout, rank
and, in classification, the head's rate; one of them may also choose rho. The best third of the trials is run with two
more seeds, and the winner of each side with fresh ones; if the winners differ in more than rho, so is LoRA with the
other winner's settings. Each run is its own process, what is finished is kept, and the same command resumes after
Ctrl-C. The end is a table, a picture, the settings of the winner, and the answer. Example: python -m recipes.tune
classification --budget 20 --data.dataset my.csv --model.model NAME --trainer.max_epochs 3
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.arguments import names_method, option
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import parse_known_options
from recipes.command_line.precision import SETTING, precision_of_runs
from recipes.data.files import write_whole
from recipes.studies.ledger import Ledger, Row, StoppedError, keep_options
from recipes.studies.process import module_of
from recipes.tune.report import Answer, answer, draw, table
from recipes.tune.search import CONTROL, KEY, WITH, Run, Search
from recipes.tune.space import RHO, SPACES, Space, parts, seeds_of


@dataclass
class Options:
    """What is searched.

    Attributes:
        recipe: a recipe's name, or the module of a LightningCLI.
        budget: trials of both sides together.
        search: an option of fit and its values, in place of what the recipe searches; may be given several times, and
            the picture is drawn against the first. Options that change together: model.lora.r/model.lora.lora_alpha
            2/4 8/16.
        rho: radii.
        fresh: seeds on which the winners are compared.
        test: compare them on the test data, not on validation data.
        metric: that validation logs; by default the one by which checkpoints are kept.
        mode: of the metric.
        folder: output folder; by default runs/tune/RECIPE.
    """

    recipe: str
    budget: int = 20
    search: list[list[str]] = field(default_factory=list)
    rho: list[float] = field(default_factory=lambda: [0.05, 0.5, 2.0, 8.0])
    fresh: int = 5
    test: bool = False
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.tried = {name: values for name, *values in self.search}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet; write ``table.txt``, ``trials.png`` and ``best.yaml``; returns the exit status."""
    # What is not one of these options is meant for `fit`, whose own parser refuses what is wrong.
    options, more = parse_known_options(Options, arguments, "python -m recipes.tune", __doc__)
    search = _search(options, more)
    folder = search.results.folder
    # More trials or seeds may be asked for later, all else would make the rows incomparable.
    asked = [f"--metric={options.metric}", f"--mode={search.mode}", f"--test={options.test}"]
    tried = [f"{name} {' '.join(values)}" for name, values in search.space.items()]
    given = [search.command, *asked, *tried, f"rho {' '.join(search.radii)}", *search.options]
    keep_options(folder, given, ["table.txt", "trials.png", "best.yaml"])
    # For the recipes' own processes, unless the options or a configuration choose one.
    os.environ[SETTING] = precision_of_runs(folder, option(more, "--trainer.accelerator") or "auto")
    try:
        search.results.perform_all(search.open_runs, partial(_perform, search), partial(_announce, search))
    except (StoppedError, KeyboardInterrupt) as stop:
        if isinstance(stop, StoppedError) and not stop.is_by_user and not search.results.rows:
            print("\nThe first run has failed, with the error above: fix its cause, and start again")
        else:
            print(f"\nThis run stopped. The same command resumes the search in {folder}")
        return getattr(stop, "status", 130)
    found = answer(search)
    assert found is not None  # of a finished search
    shown = table(search, found)
    write_whole(folder / "table.txt", shown)
    print(f"\n{shown}\n{found.verdict()}")
    draw(search).savefig(folder / "trials.png", dpi=130)
    _write_winner(search, found, folder / "best.yaml")
    method = "EFMLoRA's" if found.winner == WITH else "LoRA's"
    print(f"Everything is in {folder}: best.yaml, for fit --config, has {method} settings")
    return 0


def _perform(search: Search, run: Run) -> Row:
    """Return the row of a run; one that has failed twice counts as diverged, so that the search can end.

    Not so for a winner on fresh seeds, whose settings have worked in the search.
    """
    try:
        row = search.perform(run)
        print(f"{run}: {row['metric']} {row['value']:.4g}", flush=True)
        return row
    except StoppedError as stop:
        mark = search.results.folder / run.name / "failed"
        has_worked = run.stage == "final" and run.side != CONTROL
        if stop.is_by_user or has_worked or not search.results.rows:
            raise
        if not mark.exists():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            print(f"\n{run} has failed, with the error above; if it does so again, it counts as diverged", flush=True)
            raise
        print(f"{run} has failed twice and counts as diverged", flush=True)
        return search.failed(run)


def _announce(search: Search, run: Run) -> None:
    rows: list[Row] = search.results.rows
    left = search.left()
    left_for = ""
    if rows:
        minutes = left * sum(row["seconds"] for row in rows) / len(rows) / 60
        left_for = f", about {minutes:.0f} minutes for one process"
    print(f"\nRuns left: {left}{left_for}. Next: {run}", flush=True)


def _write_winner(search: Search, found: Answer, path: Path) -> None:
    """Write all settings of the winner as one configuration."""
    given = search.arguments(found.configs[found.winner], seed=0)
    command = [sys.executable, "-m", module_of(search.command), "fit", *given, "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Behind what the module may print when it is imported.
    write_whole(path, printed[max(0, printed.find("# lightning")) :])


def _search(options: Options, more: list[str]) -> Search:
    is_recipe = options.recipe in SPACES
    space = _space(options, more)
    if is_recipe and not names_method(options.recipe, more):
        more = ["--method=efmlora", *more]
    folder = options.folder or Path("runs/tune") / options.recipe
    return Search(
        options.recipe,
        more,
        space,
        [f"{rho:g}" for rho in options.rho],
        Ledger(folder / "results.jsonl", KEY),
        options.budget,
        options.fresh,
        options.metric,
        options.mode,
        options.test,
    )


def _space(options: Options, more: Sequence[str]) -> Space:
    given = options.tried
    problems = _mistakes(options)
    is_recipe = options.recipe in SPACES
    space = dict(given or SPACES.get(options.recipe, {}))
    more = [argument.replace(".init_args.", ".") for argument in more]
    if is_recipe and not given and option(more, "--optimizer") is not None:
        problems.append("--optimizer has its own rate: search it by --search optimizer.lr 1e-4 1e-3, say")
    for name in list(space):
        fixed = next(filter(None, (_fixing(more, each) for each in name.split("/"))), None)
        if fixed:
            print(f"--{fixed} is given, so {name} is not searched")
            del space[name]
    of_data = seeds_of(options.recipe) if is_recipe else []
    for name in ("seed_everything", "trainer.logger", *of_data):
        if option(more, f"--{name}") is not None:
            problems.append(f"--{name} is set by the search: leave it out")
    if options.metric is None and not is_recipe:
        problems.append("say what is judged, as in --metric val_loss --mode min")
    if not space and not is_recipe:
        problems.append(
            f"{options.recipe} is not a recipe: there are {', '.join(SPACES)}. If it is the module of a LightningCLI, "
            "say what is searched, as in --search model.lr 1e-4 1e-3"
        )
    if problems:
        raise MisconfigurationException("; ".join(problems))
    return space


def _fixing(arguments: Sequence[str], name: str) -> str | None:
    """Return the option that sets a setting, or a dict that it is in; None if none is given.

    Example:
        >>> _fixing(["--model.lora={r: 2}"], "model.lora.r")
        'model.lora'
    """
    while option(arguments, f"--{name}") is None:
        name = name.rpartition(".")[0]
        if "." not in name:  # --model may name a class
            return None
    return name


def _mistakes(options: Options) -> list[str]:
    """Return what is wrong with the search's own options."""
    problems = []
    names: list[str] = []
    for name, *values in options.search:
        names += name.split("/")
        numbers = {len(parts(name, value)) for value in values}
        if len(set(values)) < len(values) or numbers != {name.count("/") + 1}:
            problems.append(
                f"--search {name} must have different values, each with {name.count('/') + 1} parts, got {values}"
            )
    if len(set(names)) < len(names) or RHO in names:
        problems.append("--search names an option once, and never rho, whose values are given by --rho")
    if len(set(options.rho)) < len(options.rho) or not all(0 < rho < math.inf for rho in options.rho):
        problems.append(f"--rho must be different numbers above 0, got {options.rho}")
    if options.budget < 4 or options.fresh < 2:
        problems.append(f"--budget must be at least 4 and --fresh 2, got {options.budget} and {options.fresh}")
    if (options.metric is None) != (options.mode is None):
        problems.append("--metric and --mode go together, as in --metric val_loss --mode min")
    return problems


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
