"""What is kept of one adapter after its model was deleted."""

from dataclasses import dataclass

from recipes.report.landscape import Landscape
from recipes.report.numbers import Quantity

UNITS = {"CAUSAL_LM": "nats per token", "SEQ_CLS": "nats per example"}
"""Of the loss, by the adapter's task."""


@dataclass(frozen=True)
class Measured:
    """One adapter's column of the table and line in the pictures.

    Attributes:
        label: its name.
        folder: where it lies.
        base: name or folder of its base model.
        task: as peft calls it.
        ranks: of its pairs, each once.
        pairs: how many.
        parameters: numbers in their factors.
        terms: tokens or examples over which the loss is a mean.
        quantities: the instruments' numbers.
        landscape: losses around it.
        left_out: what could not be perturbed, and why.
    """

    label: str
    folder: str
    base: str
    task: str
    ranks: tuple[int, ...]
    pairs: int
    parameters: int
    terms: int
    quantities: list[Quantity]
    landscape: Landscape
    left_out: list[str]

    @property
    def unit(self) -> str:
        """Of the loss."""
        return UNITS[self.task]

    def value(self, name: str) -> float:
        """A quantity by its name."""
        return next(quantity.value for quantity in self.quantities if quantity.name == name)
