"""The report's folder: tables, pictures, and how all of it was measured."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from recipes.report.options import CURVES, HEADING, REPORT, SURFACE, Options
from recipes.report.pictures import draw_curves, draw_surfaces
from recipes.report.result import Measured
from recipes.shared.tables import markdown

_LIBRARIES = ("lightning-flatlora", "torch", "transformers", "peft")


def write(results: Sequence[Measured], options: Options, command: str) -> None:
    """Write the report, in place of one that is there; other files of the folder stay.

    Args:
        results: one an adapter.
        options: of the report.
        command: the command line, which goes into it.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    draw_curves(results, options, options.output / CURVES)
    if options.surface:
        draw_surfaces(results, options.output / SURFACE)
    else:  # that of an earlier report
        (options.output / SURFACE).unlink(missing_ok=True)
    (options.output / REPORT).write_text(_document(results, options, command), encoding="utf-8")


def _document(results: Sequence[Measured], options: Options, command: str) -> str:
    parts = [
        HEADING + ", ".join(result.label for result in results),
        _adapters(results),
        "## Numbers",
        _numbers(results),
        _CAUTION,
        "## Rise of the loss along lines",
        f"![The rise of the loss along lines in the weights]({CURVES})",
        _CURVES_TEXT,
    ]
    if options.surface:
        parts += [
            "## Rise of the loss on a plane",
            f"![The rise of the loss on a plane in the weights]({SURFACE})",
            _SURFACE_TEXT,
        ]
    parts += ["## How it was measured", _MEANINGS, _settings(options), f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _adapters(results: Sequence[Measured]) -> str:
    parts = [markdown([list(results[0].about), *(list(result.about.values()) for result in results)])]
    for result in results:
        parts += [f"Left out of {result.label}: {line}." for line in result.left_out]
    return "\n\n".join(parts)


def _numbers(results: Sequence[Measured]) -> str:
    """One row for each quantity, in the order of the adapter that has most."""
    longest = max(results, key=lambda result: len(result.quantities))
    rows = [[quantity.name, quantity.unit] for quantity in longest.quantities]
    for result in results:
        texts = {quantity.name: str(quantity) for quantity in result.quantities}
        for row in rows:
            row.append(texts.get(row[0], "-"))
    return markdown([["", "unit", *(result.label for result in results)], *rows])


def _settings(options: Options) -> str:
    device = options.torch_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    libraries = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    return (
        f"Data: `{options.data}`, {options.examples} examples at most, drawn with seed {options.seed}, cut at "
        f"{options.max_length} tokens.\nComputed in {options.dtype} on {name}.\n"
        f"Versions: {libraries}, Python {platform.python_version()}.\nCommand:"
    )


_CAUTION = """\
Compare with care: sharpness of adapters of different rank, of different layers or of different bases means the same
only at the same radius and on the same data. LoRA-space sharpness, balancedness and the Hessian's numbers depend on
how the update is factored into B and A; sharpness in full space does not. Small differences may be the examples': draw
others with another seed. A flat adapter need not generalize better: test that on held-out data."""

_CURVES_TEXT = """\
All three show how much higher the loss is than at the adapter; mind the scales, which differ. Left: along the
perturbation that SAM would take (distance > 0) and against it; the dots are the SAM sharpness of the table, at the
radius that E really has. Distance is that of the full weights of all adapted layers together, so it means the same for
every adapter. Middle: along directions drawn evenly from all that B can express, much further, since hardly any part of
them matters. Right: Gaussian noise on the full weights of the adapted layers, also where B can't reach."""

_SURFACE_TEXT = """\
The plane through each adapter that the adversarial direction spans with a random direction of B, orthogonal to it in
full weight space; mind that the axes have different scales. The levels are the same for all adapters. Where the rise is
negative left of the cross, the adapter is no minimum on these examples."""

_MEANINGS = """\
`W = W0 + s B A` is a layer's weight, `L` the mean loss on the examples below, without dropout.

- **SAM sharpness**: `L(W0 + s (B + E) A) - L`, E the perturbation of arXiv 2508.00522 (Eqs. 10-15) with
  `||s E A|| <= rho` over all layers together. **Realized radius**: how much of rho it uses.
- **LoRA-space sharpness**: the rise where A and B move together along their gradient, `||(E_A, E_B)|| = rho` in the
  factors' own units.
- **Expected sharpness**: the mean rise, ± its standard error, under Gaussian noise on the full weights whose standard
  deviation is sigma times a row's norm over the root of its length (arXiv 2409.14396, Eq. 7).
- **Hessian**: of L over all A and B, by Hessian-vector products: Lanczos' largest eigenvalue (to 1 %), Hutchinson's
  trace ± its standard error.
- **Balancedness**: `(||B||² - ||A||²) / 2`; **condition number**: largest over smallest singular value. Median over
  layers (smallest to largest)."""
