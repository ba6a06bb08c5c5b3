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
        unit: of the loss.
        about: what it is, by the heads of a table's columns.
        quantities: the instruments' numbers.
        landscape: losses around it.
        left_out: what could not be perturbed, and why.
    """

    label: str
    unit: str
    about: dict[str, str]
    quantities: list[Quantity]
    landscape: Landscape
    left_out: list[str]

    def value(self, name: str) -> float:
        """A quantity by its name."""
        return next(quantity.value for quantity in self.quantities if quantity.name == name)
