"""Is the perturbation worth it for your own run? One search with EFMLoRA and one without, and a sentence.

Give the recipe's name and the options of its `fit`. Both searches have as many trials of learning rate, dropout, rank
and, in classification, the head's rate; one of them may also choose rho. The best third of the trials is run with two
more seeds, and the winner of each side with fresh ones. Each run is a process of its own, what is finished is kept, and
the same command resumes after Ctrl-C. The end is a table, a picture, the settings of the winner, and the answer.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.command_line import option
from recipes.shared.files import write_whole
from recipes.shared.ledger import Row, StoppedError, keep_options
from recipes.shared.mistakes import without_traceback
from recipes.shared.tables import print_and_write
from recipes.studies.process import module_of
from recipes.studies.results import WAITING, Results, Shard, shard
from recipes.tune.report import Answer, answer, draw, table
from recipes.tune.search import KEY, Run, Search
from recipes.tune.space import SPACES, Space, pairs

_WAIT = 5.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet; write ``table.txt``, ``trials.png`` and ``best.yaml``; returns the exit status."""
    # What this parser does not know is meant for `fit`, whose own parser refuses what is wrong.
    options, more = _parser().parse_known_args(arguments)
    search = _search(options, more)
    folder = search.results.folder
    # More trials or seeds may be asked for later, all else would make the rows incomparable.
    asked = [f"--metric={options.metric}", f"--mode={options.mode}", f"--test={options.test}"]
    tried = [f"{name} {' '.join(values)}" for name, values in search.space.items()]
    given = [search.command, *asked, *tried, f"rho {' '.join(search.radii)}", *search.options]
    keep_options(folder, given, written=["table.txt", "trials.png", "best.yaml"])
    try:
        run = search.next_run()
        while run is not None:
            if not search.results.own.perform_first([run], search.perform, partial(_announce, search)):
                time.sleep(_WAIT)  # another process does this run
            search.results.reload()
            run = search.next_run()
    except StoppedError as stop:
        print(f"This run stopped. The same command resumes the search in {folder}")
        return stop.status
    found = answer(search)
    if found is None:
        print("This share waits for the runs of others. Start the same command again when they are done")
        return WAITING
    print_and_write(table(search, found), folder / "table.txt")
    draw(search).savefig(folder / "trials.png", dpi=130)
    _write_winner(search, found, folder / "best.yaml")
    print(found.verdict())
    print(f"Runs, results, table.txt, trials.png and best.yaml, for fit --config, are in {folder}")
    return 0


def _announce(search: Search, run: Run) -> None:
    rows: list[Row] = search.results.rows
    left = search.runs() - len(rows)
    left_for = ""
    if rows:
        minutes = left * sum(row["seconds"] for row in rows) / len(rows) / 60 / search.results.shard.count
        left_for = f", about {minutes:.0f} minutes"
    print(f"\n{left} of {search.runs()} runs are left{left_for}. Next: {run}", flush=True)


def _write_winner(search: Search, found: Answer, path: Path) -> None:
    """All settings of the winner as one configuration."""
    given = search.arguments(found.configs[found.winner], seed=0)
    command = [sys.executable, "-m", module_of(search.command), "fit", *given, "--print_config"]
    write_whole(path, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _search(options: argparse.Namespace, more: list[str]) -> Search:
    is_recipe = options.command in SPACES
    if not is_recipe and "." not in options.command:
        raise MisconfigurationException(
            f"{options.command} is no recipe: there are {', '.join(SPACES)}, or give the module of a LightningCLI, "
            "such as my_project.train"
        )
    space = _space(options)
    trials, hours = _budget(options.budget)
    if is_recipe and option(more, "--method") is None and option(more, "--config") is None:
        more = ["--method=efmlora", *more]
    folder = options.folder or Path("runs/tune") / options.command
    return Search(
        options.command,
        more,
        space,
        options.rho,
        Results(folder, KEY, options.shard),
        trials,
        hours,
        options.fresh,
        options.metric,
        options.mode,
        options.test,
    )


def _space(options: argparse.Namespace) -> Space:
    given: dict[str, list[str]] = {}
    problems = []
    for name, *values in options.tried or []:
        given[name] = values
        try:
            for value in values:
                pairs(name, value)
        except ValueError:
            problems.append(f"--try {name}: each value must have {name.count('/') + 1} parts, got {' '.join(values)}")
        if len(set(values)) < len(values) or not values:
            problems.append(f"--try {name} must have values, each of them once, got {values}")
    space = given or SPACES.get(options.command, {})
    if not space:
        problems.append("say what is searched, such as --try model.lr 1e-4 1e-3")
    if any(not float(rho) > 0 for rho in options.rho) or len(set(options.rho)) < len(options.rho):
        problems.append(f"--rho must be different numbers above 0, got {' '.join(options.rho)}")
    if options.fresh < 2:
        problems.append(f"--fresh must be at least 2, got {options.fresh}")
    if problems:
        raise MisconfigurationException("; ".join(problems))
    return space


def _budget(text: str) -> tuple[int, float | None]:
    """Trials and hours.

    Example:
        >>> _budget("20"), _budget("1.5h")
        ((20, None), (0, 1.5))
    """
    try:
        if text.endswith("h") and float(text[:-1]) > 0:
            return 0, float(text[:-1])
        if int(text) >= 4:
            return int(text), None
    except ValueError:
        pass
    raise MisconfigurationException(
        f"--budget must be trials of both sides, at least 4, or hours, as in 2h: got {text}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tune",
        description=__doc__,
        # An abbreviation might be an option of the recipe.
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m recipes.tune classification --budget 20 \\\n"
        "    --data.dataset my.csv --model.model NAME --trainer.max_epochs 3",
    )
    parser.add_argument("command", metavar="RECIPE", help=f"{', '.join(SPACES)}, or the module of a LightningCLI")
    parser.add_argument(
        "--budget", default="20", help="trials of both sides together, or hours of a process, as in 2h; default 20"
    )
    parser.add_argument(
        "--try", dest="tried", nargs="+", action="append", metavar=("OPTION", "VALUE"),
        help="values of an option of fit, in place of what the recipe searches; may be given several times, and the "
        "picture is drawn against the first. Options that change together: model.lora.r/model.lora.lora_alpha 2/4 8/16",
    )  # fmt: skip
    parser.add_argument("--rho", nargs="+", default=["0.05", "0.5", "2", "8"], help="radii; default 0.05 0.5 2 8")
    parser.add_argument("--fresh", type=int, default=5, help="seeds on which the winners are compared; default 5")
    parser.add_argument("--test", action="store_true", help="compare them on the test data, not on validation data")
    parser.add_argument("--metric", help="that validation logs; default: the one by which checkpoints are kept")
    parser.add_argument("--mode", choices=["min", "max"], help="of the metric; default: as the configuration has it")
    parser.add_argument("--shard", type=shard, default=Shard(), metavar="1/2", help="do the first of two shares")
    parser.add_argument("--folder", type=Path, help="where everything lands; default runs/tune/RECIPE")
    return parser


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
