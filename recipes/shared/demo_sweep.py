"""How a demo's rho is chosen: a sweep judged on the validation part, which the demo's own table never shows."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.shared.methods import OURS
from recipes.shared.precision import Precision, precision_of_runs
from recipes.shared.progress import quiet

Cells = Sequence[str]


def parser(prog: str, radii: Sequence[float], folder: Path) -> argparse.ArgumentParser:
    """The arguments that every such sweep has.

    Args:
        prog: the command.
        radii: to try, unless ``--rho`` names others.
        folder: where the runs land, unless ``--folder`` names another.
    """
    made = argparse.ArgumentParser(prog=prog, description=__doc__)
    made.add_argument("--rho", type=float, nargs="+", default=list(radii), help="radii to try")
    made.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS), help="LoRA has no radius")
    made.add_argument("--folder", type=Path, default=folder, help=f"where the runs land; default {folder}")
    return made


def print_sweep(
    options: argparse.Namespace, columns: Cells, validated: Callable[[str, float, Precision], Cells]
) -> None:
    """Print what validation says of each method and rho; the table grows with every run.

    Args:
        options: of :func:`parser`.
        columns: what is measured.
        validated: trains with a method, a rho and a precision unless that has been done, and gives a cell for each
            column.
    """
    quiet()
    precision = precision_of_runs(options.folder)
    table = Table("method", "rho", *columns)
    for method in options.methods:
        # LoRA has no radius: it is trained once, as what the others are compared with.
        for rho in options.rho if method != "LoRA" else [0.0]:
            table.add_row(method, f"{rho:g}", *validated(method, rho, precision))
            Console().print(table)
