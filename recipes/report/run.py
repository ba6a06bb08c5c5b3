"""Turn a command line into a report."""

import shlex
import sys
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora.flatness import MeanLoss, Point, base_norm, loss_gradient, trained_factors
from lightning_flatlora.perturbation import Perturbation
from recipes.report import numbers
from recipes.report.adapters import Adapted, base_and_task, load_adapter
from recipes.report.data import Row, columns_for, mean_loss, read_rows
from recipes.report.document import write
from recipes.report.landscape import measure_landscape
from recipes.report.numbers import NORM, UNITS, Measured, Quantity
from recipes.report.options import AdapterFolder, Options, parse
from recipes.report.rounding import measure_rounding


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that a command line asks for.

    Args:
        arguments: the command line's; None takes the process's own.

    Raises:
        MisconfigurationException: for a user's mistake, before anything is written.
    """
    command = ["python", "-m", "recipes.report", *(sys.argv[1:] if arguments is None else arguments)]
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)  # before hours of measuring
    write(measure(options), options, shlex.join(command))
    print(f"Wrote {options.output / 'report.md'}")


def measure(options: Options) -> list[Measured]:
    """Measure every adapter's numbers and landscape, with one model at a time in memory.

    Raises:
        MisconfigurationException: an adapter or the data can't be used, or a loss is not finite. Whatever can be
            checked without a model is reported first, and all the rest before the first adapter is measured.
    """
    rows = read_rows(options)
    for folder in options.adapters:
        _, task = base_and_task(folder, options)
        columns_for(task, rows)
    # Loaded to see that they fit, before hours of measuring; the first one is loaded to be measured anyway.
    for folder in options.adapters[1:]:
        mean_loss(load_adapter(folder, options), rows, options)
    return [_measure_one(folder, rows, options) for folder in options.adapters]


def _measure_one(folder: AdapterFolder, rows: list[Row], options: Options) -> Measured:
    adapted = load_adapter(folder, options)
    loss, terms = mean_loss(adapted, rows, options)
    pairs, unit = adapted.pairs, UNITS[adapted.task]
    print(f"\n{adapted.label}", flush=True)
    quantities = []
    point = _point(adapted, loss, options)
    for quantity in numbers.measure_numbers(point, unit, options):
        print(f"{quantity.name}: {quantity}", flush=True)
        quantities.append(quantity)
    norm = base_norm(adapted.model, pairs)
    quantities.append(Quantity(NORM, "weight", norm))
    print("Pictures", flush=True)
    around = measure_landscape(point, adapted.noise, norm, options)
    rounding = measure_rounding(loss, pairs, options.bits) if options.bits else ()
    about = {
        "adapter": adapted.label,
        "folder": f"`{folder.path}`",
        "base": f"`{adapted.base}`",
        "task": adapted.task,
        "rank": ", ".join(map(str, sorted({pair.A.shape[0] for pair in pairs}))),
        "pairs": str(len(pairs)),
        "parameters": f"{sum(factor.numel() for factor in trained_factors(pairs)):,}",
        "loss over": f"{terms:,} {unit.removeprefix('nats per ')}s",
    }
    return Measured(adapted.label, unit, about, quantities, around, adapted.left_out, rounding)


def _point(adapted: Adapted, loss: MeanLoss, options: Options) -> Point:
    """Return the loss around an adapter, with its gradient there.

    Raises:
        MisconfigurationException: one of them is not finite.
    """
    at = loss_gradient(loss, trained_factors(adapted.pairs))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (at.loss, *at.gradients)):
        raise MisconfigurationException(
            f"--adapter {adapted.label}: the loss or its gradient is not finite. Its training may have diverged; if it "
            "has not, try --dtype float32 or float64"
        )
    return Point(
        loss,
        Perturbation(adapted.pairs),
        rho=1.0,
        noise=adapted.noise,
        sigma=options.sigma,
        samples=options.samples,
        seed=options.seed,
        at=at,
    )
