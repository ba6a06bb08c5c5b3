"""What the reports on kept adapters share: they are secondary, compare with LoRA by seed, and are written alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from recipes.evidence.kept import ledger_of
from recipes.evidence.plan import key_of_row
from recipes.evidence.verdict import Difference
from recipes.evidence.workloads import PROBE
from recipes.shared.ledger import Row
from recipes.shared.tables import Table

SECONDARY = (
    "These comparisons are secondary. Their intervals are not corrected for the number of comparisons: about one in "
    "twenty of them excludes equality by chance alone."
)


class KeptReport(Protocol):
    """On one evaluation of kept adapters.

    Attributes:
        name: of the files that it is written to.
    """

    name: str

    def is_empty(self) -> bool:
        """Whether no adapter has been judged."""

    def tables(self) -> list[Table]:
        """All of its tables."""

    def figure(self) -> Figure | None:
        """Its picture, None where there is nothing to compare."""


def with_judgements(rows: Mapping[str, Sequence[Row]], path: Path) -> dict[str, list[tuple[Row, Row | None]]]:
    """The rows of each arm that has a judged adapter, each with that of its adapter, None where there is none.

    Args:
        rows: of the runs, by arm.
        path: of the evaluation's rows.
    """
    by_key = {str(key_of_row(row)): row for row in ledger_of(path).rows}
    found = {}
    for arm, of_arm in rows.items():
        pairs = [(row, by_key.get(str(key_of_row(row)))) for row in of_arm]
        if arm != PROBE and any(judged is not None for _, judged in pairs):
            found[arm] = pairs
    return found


def difference_cell(found: Difference | None, digits: int) -> str:
    """A mean difference and its 95 % interval in a table's cell, empty where there is none."""
    if found is None:
        return ""
    return f"{found.estimate.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def write_kept(report: KeptReport, folder: Path) -> list[Path]:
    """Write the tables as Markdown, and the picture; returns the paths."""
    text = "\n".join(table.markdown() for table in report.tables())
    paths = [folder / f"{report.name}.md"]
    paths[0].write_text(f"{SECONDARY}\n\n{text}", encoding="utf-8")
    figure = report.figure()
    if figure is not None:
        paths.append(folder / f"{report.name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths
