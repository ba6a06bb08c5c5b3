"""Choose rho for your own run of a recipe: a few short runs, judged on validation data.

Give the recipe's name and the options of its `fit`; without --method and --config the method is EFMLoRA. Every radius
is run with every seed, each run in a process of its own. What is finished is kept, and the same command resumes after
Ctrl-C. The end is a table, a plot, and the radius with the best mean; rho = 0 is plain LoRA and belongs in every sweep.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora.schedules import is_size
from recipes.choose_rho.report import advice, draw, table
from recipes.choose_rho.run import Run, Sweep
from recipes.shared.command_line import option
from recipes.shared.ledger import Ledger, Row, StoppedError, entries, keep_options
from recipes.shared.mistakes import without_traceback
from recipes.shared.tables import print_and_write

RECIPES = ("classification", "instruction_tuning", "nlg", "vqa", "clip_fewshot", "clip_contrastive")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet; write ``results.jsonl``, ``table.txt`` and ``rho.png``; returns the exit status."""
    options, fit_options = _parser().parse_known_args(arguments)
    folder = options.folder or Path("runs/choose_rho") / options.recipe
    _check(options)
    metric, mode = options.metric, options.mode
    # Rows of two metrics can't be compared.
    asked = [f"--{name}={value}" for name, value in (("metric", metric), ("mode", mode)) if value is not None]
    if option(fit_options, "--method") is None and option(fit_options, "--config") is None:
        fit_options = ["--method=efmlora", *fit_options]
    given = [options.recipe, *asked, *fit_options]
    keep_options(folder, given, written=["table.txt", "rho.png"])
    sweep = Sweep(options.recipe, fit_options, folder, metric, mode)
    ledger = Ledger(folder / "results.jsonl", entries("rho", "seed"))
    rows: list[Row] = []
    try:
        # Seed by seed: whoever stops early has every radius.
        runs = [Run(rho, seed) for seed, rho in product(options.seeds, options.rho)]
        for row in ledger.complete(runs, sweep.perform):
            rows.append(row)
    except StoppedError as stop:
        print(f"This run stopped. The same command resumes the sweep in {folder}")
        return stop.status
    print_and_write(table(rows), folder / "table.txt")
    draw(rows).savefig(folder / "rho.png", dpi=130)
    print(advice(rows))
    print(f"Runs, results.jsonl, table.txt and rho.png are in {folder}")
    return 0


def _check(options: argparse.Namespace) -> None:
    problems = []
    wrong = [f"{rho:g}" for rho in options.rho if not is_size(rho)]
    if wrong:
        problems.append(f"--rho must be finite numbers of 0 or more, got {', '.join(wrong)}")
    for name in ("rho", "seeds"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            problems.append(f"--{name} has a value twice: {values}")
    if problems:
        raise MisconfigurationException("; ".join(problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.choose_rho",
        description=__doc__,
        # An abbreviation might be an option of the recipe.
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m recipes.choose_rho classification --rho 0 0.1 0.5 2 \\\n"
        "    --data.dataset my.csv --model.model NAME --method efmlora \\\n"
        "    --trainer.max_epochs 1 --trainer.limit_train_batches 100",
    )
    parser.add_argument("recipe", choices=RECIPES, help="whose `fit` is run")
    parser.add_argument(
        "--rho", type=float, nargs="+", default=[0.0, 0.03, 0.1, 0.3, 1.0], help="radii; default 0 0.03 0.1 0.3 1"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of each radius, as --seed_everything; default 0"
    )
    parser.add_argument("--metric", help="that validation logs; default: the one by which checkpoints are kept")
    parser.add_argument("--mode", choices=["min", "max"], help="of the metric; default: as the configuration has it")
    parser.add_argument("--folder", type=Path, help="where everything lands; default runs/choose_rho/RECIPE")
    return parser


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
