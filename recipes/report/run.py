"""From a command line to a report."""

import shlex
import sys
from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel

from lightning_flatlora.flatness import Loss, MeanLoss, Point, base_norm, loss_gradient, trained_factors
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair, NoPairsError, PairSearch
from lightning_flatlora.perturbation import Perturbation
from recipes.report import landscape, numbers
from recipes.report.adapters import Adapted, base_of, load, task_of
from recipes.report.data import Row, columns_for, mean_loss, read_rows
from recipes.report.document import write
from recipes.report.options import AdapterFolder, Options, parse
from recipes.report.result import UNITS, Measured
from recipes.shared.progress import progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that a command line asks for.

    Args:
        arguments: of the command line; None takes the process's own.

    Raises:
        MisconfigurationException: for a mistake of the user's, before anything is written.
    """
    command = ["python", "-m", "recipes.report", *(sys.argv[1:] if arguments is None else arguments)]
    options = parse(arguments)
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
        base_of(folder, options)
        columns_for(task_of(folder), rows)
    # Loaded to see that they fit, before hours of measuring; the first one is loaded for that anyway.
    for folder in options.adapters[1:]:
        _load(folder, rows, options)
    return [_measure_one(folder, rows, options) for folder in options.adapters]


def _measure_one(folder: AdapterFolder, rows: list[Row], options: Options) -> Measured:
    adapted, search, loss, terms = _load(folder, rows, options)
    pairs, unit = search.pairs, UNITS[adapted.task]
    noise, left_out = _noise(adapted.model, search.left_out)
    # An estimate: how many products the eigenvalue takes is known only at the end.
    total = (numbers.passes(options) + landscape.passes(options)) * len(loss.losses)
    with progress(f"{adapted.label}, batches", total) as bar:
        counted = MeanLoss([partial(_counted, part, bar) for part in loss.losses])
        point = _point(folder, pairs, counted, noise, options)
        quantities = numbers.measure_numbers(point, unit, options)
        norm = base_norm(adapted.model, pairs)
        around = landscape.measure_landscape(point, norm, options)
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
    quantities.append(numbers.Quantity(numbers.NORM, "weight", norm))
    return Measured(adapted.label, unit, about, quantities, around, left_out)


def _load(folder: AdapterFolder, rows: list[Row], options: Options) -> tuple[Adapted, PairSearch, MeanLoss, int]:
    """An adapter, its pairs, its loss and the number of the loss's terms.

    Raises:
        MisconfigurationException: they don't fit together.
    """
    adapted = load(folder, options)
    try:
        search = find_pairs(adapted.model)
    except NoPairsError as error:
        raise MisconfigurationException(f"--adapter {folder.path}: {error}") from error
    return adapted, search, *mean_loss(adapted, rows, options)


def _point(
    folder: AdapterFolder, pairs: list[LoRAPair], loss: MeanLoss, noise: WeightNoise | None, options: Options
) -> Point:
    """The loss around an adapter, with its gradient there.

    Raises:
        MisconfigurationException: one of them is not finite.
    """
    at = loss_gradient(loss, trained_factors(pairs))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (at.loss, *at.gradients)):
        broken = [pair.name for pair in pairs if not (pair.A.isfinite().all() and pair.B.isfinite().all())]
        if broken:
            problem = f"the adapter holds numbers that are not finite, as in {broken[0]}: its training has diverged"
        else:
            problem = "the loss or its gradient is not finite: try --dtype float32 or float64"
        raise MisconfigurationException(f"--adapter {folder.path}: {problem}")
    perturbation, rho = Perturbation(pairs), 1.0
    return Point(
        loss, perturbation, rho, noise=noise, sigma=options.sigma, samples=options.samples, seed=options.seed, at=at
    )


def _noise(model: PeftModel, left_out: list[str]) -> tuple[WeightNoise | None, list[str]]:
    """Noise on the full weights, where a layer can have it, and which can't."""
    try:
        noise = WeightNoise(model)
    except NoPairsError as error:
        return None, [*left_out, str(error)]
    return noise, noise.left_out


def _counted(part: Loss, bar: Tqdm) -> torch.Tensor:
    """One batch's loss, which moves the progress bar."""
    bar.update()
    return part()
