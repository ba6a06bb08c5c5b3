"""The options of the report's command line, and their checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.options import parse_options

FILES = ("report.md", "curves.png", "surface.png", "rounding.png", "layers.csv")


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that ``save_pretrained`` or AdapterCheckpoint has written.

    Attributes:
        label: its name in tables and pictures.
        path: the folder's.
    """

    label: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> "AdapterFolder":
        """Read ``folder`` or ``label=folder``; a checkpoint's folder may have an equals sign in its own name.

        Example:
            >>> AdapterFolder.parse("runs/lora"), AdapterFolder.parse("mine=runs/epoch=2").path.name
            (AdapterFolder(label='lora', path=PosixPath('runs/lora')), 'epoch=2')
        """
        label, equals, rest = text.partition("=")
        if not equals or "/" in label or Path(text).exists():
            label, rest = Path(text).resolve().name, text
        return cls(label, Path(rest).expanduser())


@dataclass(frozen=True)
class Options:
    """The settings of one report, as ``--help`` explains them.

    Attributes:
        adapter: [LABEL=]FOLDER, one or more, as peft's save_pretrained or AdapterCheckpoint write them; of causal
            language models and of sequence classifiers.
        data: a .jsonl, .json, .csv or .parquet file, or anything else that `datasets` reads. Columns: text; prompt and
            completion; or messages (through the chat template; loss on the assistant's tokens). Classifiers: text and
            label.
        base: name on the Hub or folder of the base model; by default the one that each adapter names.
        output: folder for the report only; an earlier report in it is replaced.
        rho: radii of SAM's ball, ||s E A|| in the weights' units; pictures go to twice the largest. Take those that
            you train with: which radii are small depends on the model and on the number of adapted layers.
        sigma: noise on the weights, relative to their rows' norms; pictures go to twice that, and along random
            directions to sigma times the norm of all weights.
        points: points per curve and per side of the surface; odd.
        directions: random directions in each mean and band.
        samples: draws for expected sharpness and the Hessian's trace.
        examples: number of examples, drawn from the data with the seed.
        batch_size: examples at once; it changes memory, not results.
        max_length: tokens kept of an example.
        chat_template: file of a Jinja template for messages; by default the tokenizer's own.
        seed: for examples, directions and draws.
        dtype: the base's; bfloat16 rounds away small rises.
        curvature: measure the Hessian, in about the time of 100 points.
        surface: draw the loss over a plane, by points x points evaluations.
        bits: numbers of bits from 2 to 24, as in --bits 8 4 3 2: measure the loss after rounding the adapted weights to
            each. Adds rounding.png and layers.csv; takes memory for a second copy of these weights.
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
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    curvature: bool = True
    surface: bool = True
    bits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        labels = [adapter.label for adapter in self.adapters]
        if len(set(labels)) < len(labels):
            raise MisconfigurationException(f"--adapter: labels must differ, got {labels}: write LABEL=FOLDER")
        are_finite = all(0 < size < math.inf for size in (*self.rho, self.sigma))
        are_many = min(self.directions, self.samples, self.max_length, self.examples + 1, self.batch_size + 1) >= 2
        if not (are_finite and are_many and self.points >= 3 and self.points % 2):
            raise MisconfigurationException(
                "--rho and --sigma must be finite and > 0, --directions, --samples and --max_length 2 or more, "
                f"--examples and --batch_size 1 or more, and --points 3 or more and odd: got {self}"
            )
        if not all(2 <= bits <= 24 for bits in self.bits):
            raise MisconfigurationException(f"--bits must be whole numbers from 2 to 24, got {self.bits}")
        others = sorted({path.name for path in self.output.glob("*")} - set(FILES))
        if others:
            raise MisconfigurationException(
                f"--output {self.output} holds {', '.join(others[:3])}: give another folder"
            )

    @property
    def adapters(self) -> list[AdapterFolder]:
        """The adapters' folders with their labels."""
        return [AdapterFolder.parse(text) for text in self.adapter]

    @property
    def torch_device(self) -> torch.device:
        """A GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse a command line.

    Raises:
        MisconfigurationException: an option is wrong.
        SystemExit: for --help, and for arguments that jsonargparse refuses.
    """
    description = "How flat is the loss around finished LoRA adapters? Writes report.md, curves.png and surface.png."
    return parse_options(Options, arguments, "python -m recipes.report", description)
