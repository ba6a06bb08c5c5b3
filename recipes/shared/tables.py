"""Tables for the terminal and for a document."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
from rich.console import Console
from rich.markup import escape


@dataclass(frozen=True)
class Table:
    """A table for the terminal.

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

    def show(self, console: Console) -> None:
        """In the terminal."""
        shown = rich.table.Table(title=self.title)
        for place, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if place else "left")
        for row in self.rows:
            shown.add_row(*map(escape, row))  # a value such as [q_proj, v_proj] is no markup
        console.print(shown, *map(escape, self.notes), "", sep="\n")


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


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
