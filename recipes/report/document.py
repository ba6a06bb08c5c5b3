"""Write the report's folder: tables, pictures, and how everything was measured."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template

import torch
from pandas import concat

from recipes.report.numbers import Measured
from recipes.report.options import FILES, Options
from recipes.report.pictures import draw_curves, draw_rounding, draw_surfaces
from recipes.studies.tables import markdown

_LIBRARIES = ("lightning-flatlora", "torch", "transformers", "peft")


def write(results: Sequence[Measured], options: Options, command: str) -> None:
    """Write the report, replacing an earlier one.

    Args:
        results: one per adapter.
        options: the report's; its folder exists.
        command: the command line, to be shown in the report.
    """
    report, curves, surface, rounding, layers = [options.output / name for name in FILES]
    draw_curves(results, options, curves)
    text = Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    if options.surface:
        draw_surfaces(results, surface)
    else:
        surface.unlink(missing_ok=True)
        text = re.sub("## Rise of the loss on a plane.*?(?=## )", "", text, flags=re.DOTALL)
    if options.bits:
        draw_rounding(results, rounding)
        by_adapter = {result.label: result.rounding[1] for result in results}
        concat(by_adapter, names=["adapter", "layer"]).to_csv(layers)
    else:
        rounding.unlink(missing_ok=True)
        layers.unlink(missing_ok=True)
        text = re.sub("## After rounding.*?(?=## )", "", text, flags=re.DOTALL)
    device = options.torch_device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    libraries = [f"{library} {version(library)}" for library in _LIBRARIES]
    entries = {
        "labels": ", ".join(result.label for result in results),
        "adapters": _adapters(results),
        "numbers": _numbers(results),
        "rounding": _rounding(results) if options.bits else "",
        "device": machine,
        "versions": ", ".join([*libraries, f"Python {platform.python_version()}"]),
        "command": command,
    }
    text = Template(text).substitute(vars(options) | entries)
    report.write_text(text, encoding="utf-8")


def _adapters(results: Sequence[Measured]) -> str:
    parts = [markdown([list(results[0].about), *(list(result.about.values()) for result in results)])]
    for result in results:
        parts += [f"Left out of {result.label}: {line}." for line in result.left_out]
    return "\n\n".join(parts)


def _numbers(results: Sequence[Measured]) -> str:
    """Return a row for each quantity and a column for each adapter."""
    rows = [["", "unit", *(result.label for result in results)]]
    for quantities in zip(*(result.quantities for result in results), strict=True):
        rows.append([quantities[0].name, quantities[0].unit, *map(str, quantities)])
    return markdown(rows)


def _rounding(results: Sequence[Measured]) -> str:
    """Return a row for each number of bits of each adapter."""
    losses = concat({result.label: result.rounding[0] for result in results}, names=["adapter", "bits"])
    table = losses.map("{:.4g}".format).reset_index()
    return markdown([list(table), *table.to_numpy().tolist()])
