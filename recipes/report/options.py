"""The options of the report's command line, and what is wrong with them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.options import parse_options

REPORT, CURVES, SURFACE = "report.md", "curves.png", "surface.png"
HEADING = "# Flatness of "
"""How a report begins."""
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that ``save_pretrained`` or AdapterCheckpoint has written.

    Attributes:
        label: its name in tables and pictures.
        path: of the folder.
    """

    label: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> "AdapterFolder":
        """``folder`` or ``label=folder``; a checkpoint's folder may have an equals sign in its own name.

        Example:
            >>> AdapterFolder.parse("runs/lora"), AdapterFolder.parse("mine=runs/epoch=2").path.name
            (AdapterFolder(label='lora', path=PosixPath('runs/lora')), 'epoch=2')
        """
        label, equals, rest = text.partition("=")
        if not equals or "/" in label or Path(text).exists():
            label, rest = Path(text).resolve().name, text
        return cls(label, Path(rest).expanduser())

    @property
    def config(self) -> dict[str, Any]:
        """What ``adapter_config.json`` says."""
        read: dict[str, Any] = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
        return read

    def check(self) -> None:
        """Refuse what can't be measured, as far as can be told before a model is loaded."""
        name = f"--adapter {self.path}"
        if not self.path.is_dir():
            raise MisconfigurationException(f"{name} is not a folder")
        if not (self.path / _CONFIG).exists():
            inside = sorted(str(config.parent) for config in self.path.glob(f"*/{_CONFIG}"))
            hint = f"take {' or '.join(inside)}" if inside else "not peft's folder"
            raise MisconfigurationException(f"{name} holds no {_CONFIG}: {hint}")
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise MisconfigurationException(f"{name} is of type {kind}: only LoRA adapters can be measured")


@dataclass(frozen=True)
class Options:
    """The settings of one report, as ``--help`` explains them.

    Attributes:
        adapter: [LABEL=]FOLDER, one or more, as peft's save_pretrained or AdapterCheckpoint write them; of causal
            language models and of sequence classifiers.
        data: a file ending in .jsonl, .json, .csv or .parquet. Columns: text; prompt and completion; or messages
            (through the chat template; loss on the assistant's tokens). Classifiers: text and label.
        base: name on the Hub or folder of the base model; by default the one that each adapter names.
        output: folder of the report.
        rho: radii of SAM's ball, ||s E A|| in the weights' units; pictures go to twice the largest. Take those that
            you train with: what is small depends on the model and on how many layers are adapted.
        sigma: noise on the weights, relative to their rows' norms; pictures go to twice that, and to once that, of the
            norm of all weights, along random directions.
        points: points of a curve and of each side of the surface; odd.
        directions: random directions in each mean and band.
        samples: draws for expected sharpness and the Hessian's trace.
        examples: how many of the data, drawn with the seed.
        batch_size: examples at once; it changes memory, not results.
        max_length: tokens kept of an example.
        chat_template: file of a Jinja template for messages; by default the tokenizer's own.
        seed: of examples, directions and draws.
        device: as torch calls it; auto is a GPU where there is one.
        dtype: of the base; bfloat16 rounds away small rises.
        curvature: measure the Hessian, in about the time of 100 points.
        surface: draw the loss over a plane, by points x points evaluations.
    """

    adapter: list[str]
    data: Path
    base: str | None = None
    output: Path = Path("flatness_report")
    rho: list[float] = field(default_factory=lambda: [0.05, 0.1])
    sigma: float = 0.05
    points: int = 9
    directions: int = 5
    samples: int = 8
    examples: int = 32
    batch_size: int = 8
    max_length: int = 512
    chat_template: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    curvature: bool = True
    surface: bool = True

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            adapter.check()
            if self.output.resolve().is_relative_to(adapter.path.resolve()):
                raise MisconfigurationException(f"--output {self.output} is in the adapter's folder: take another")
        labels = [adapter.label for adapter in self.adapters]
        if len(set(labels)) < len(labels):
            raise MisconfigurationException(f"--adapter: labels must differ, got {labels}: write LABEL=FOLDER")
        if not self.data.is_file():
            raise MisconfigurationException(f"--data {self.data} is not a file")
        self._check_output()
        self._check_numbers()

    @property
    def adapters(self) -> list[AdapterFolder]:
        """The adapters' folders with their labels."""
        return [AdapterFolder.parse(text) for text in self.adapter]

    @property
    def reach(self) -> float:
        """How far pictures go along the adversarial direction, in the weights' units."""
        return 2 * max(self.rho)

    @property
    def torch_device(self) -> torch.device:
        """Where to measure."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def _check_output(self) -> None:
        """Refuse a folder that can't be written, or in which a report would replace what no report has written."""
        output = self.output.resolve()
        there = next(folder for folder in (output, *output.parents) if os.path.exists(folder))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise MisconfigurationException(f"--output {self.output} can't be written: {there} is no folder for that")
        report = self.output / REPORT
        if report.is_file() and report.read_text(encoding="utf-8", errors="replace").startswith(HEADING):
            return
        for name in (REPORT, CURVES, SURFACE):
            if (self.output / name).exists():
                raise MisconfigurationException(
                    f"--output {self.output} holds {name}, which no report has written: take another folder"
                )

    def _check_numbers(self) -> None:
        if not all(0 < size < math.inf for size in (*self.rho, self.sigma)):
            raise MisconfigurationException(
                f"--rho and --sigma must be finite and > 0, got {self.rho} and {self.sigma}"
            )
        least = {"directions": 2, "samples": 2, "examples": 1, "batch_size": 1, "max_length": 2, "points": 3}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise MisconfigurationException(f"--{name} must be {smallest} or more, got {getattr(self, name)}")
        if self.points % 2 == 0:
            raise MisconfigurationException(f"--points must be odd, so that one is the adapter, got {self.points}")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse a command line.

    Raises:
        MisconfigurationException: something is wrong with it.
        SystemExit: for --help, and for what jsonargparse refuses.
    """
    description = "How flat is the loss around finished LoRA adapters? Writes report.md, curves.png and surface.png."
    return parse_options(Options, arguments, "python -m recipes.report", description)
