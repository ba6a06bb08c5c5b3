"""Tables for the terminal and for a document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
from rich.console import Console

_SHORT = {"learning_rate": "rate", "weight_decay": "decay"}


@dataclass(frozen=True)
class Table:
    """A table that can be shown in two ways.

    Attributes:
        title: above it.
        columns: their names.
        rows: the cells.
        notes: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """For a document."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *map(_line, self.rows), "", *(f"- {note}" for note in self.notes), ""])

    def show(self, console: Console) -> None:
        """In the terminal."""
        shown = rich.table.Table(title=self.title)
        for place, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if place else "left")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown, *self.notes, "", sep="\n")


def print_and_write(table: Table, path: Path) -> None:
    """Print a table, and write it to a file as it was printed."""
    with path.open("w", encoding="utf-8") as file:
        table.show(Console(file=file, width=110))
    table.show(Console())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, of which the first is the head, as a table.

    Example:
        >>> print(markdown([["a", "b"], ["1", ""]]))
        | a | b |
        |---|---|
        | 1 |  |
    """
    head, *body = lines
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, body)])


def settings_text(config: Mapping[str, float]) -> str:
    """A configuration in a cell, with the usual names shortened.

    Example:
        >>> settings_text({"learning_rate": 0.001, "rho": 0.5})
        'rate 0.001, rho 0.5'
    """
    return ", ".join(f"{_SHORT.get(name, name)} {value:g}" for name, value in config.items())


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
